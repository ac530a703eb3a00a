"""Graphics cards, what they rent for, and whether a run fits on them."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medtune.errors import UserError

PRICES = Path(__file__).parents[2] / "docs/prices.csv"
# Of a card's memory, what "fits" leaves free.
FREE = 0.1


@dataclass(frozen=True)
class Card:
    """A card by its makers' figures.

    gb: of its name; gib: what torch sees of it.
    tflops: 10^12 operations a second of matrix products in bfloat16, without sparsity, with
        sums in float32.
    gb_s: 10^9 bytes a second from its memory.
    """

    name: str
    gb: int
    gib: float
    tflops: float
    gb_s: float


CARDS = (
    Card("RTX 4080", 16, 15.6, 97, 717),
    Card("RTX 3090", 24, 23.6, 71, 936),
    Card("RTX 4090", 24, 23.5, 165, 1008),
    Card("RTX 5090", 32, 31.3, 209, 1792),
    Card("A100 40GB", 40, 39.4, 312, 1555),
    Card("L40S", 48, 44.4, 362, 864),
    Card("A100 80GB", 80, 79.1, 312, 2039),
    Card("H100 80GB", 80, 79.1, 989, 3350),
    Card("H20", 96, 95.0, 148, 4000),
    Card("RTX PRO 6000", 96, 94.9, 252, 1792),
    Card("H200", 141, 139.8, 989, 4800),
)


def choose_cards(names: Sequence[str]) -> list[Card]:
    """The cards of some names, or parts of names such as 4090 and A100; all without.

    Raises UserError for a card that is not known.
    """
    chosen: list[Card] = []
    for name in names:
        cards = [card for card in CARDS if _short(name) in _short(card.name)]
        cards = [card for card in cards if _short(name) == _short(card.name)] or cards
        if not cards:
            raise UserError(f"--card {name.strip()}: not known; known are {', '.join(card.name for card in CARDS)}")
        chosen += [card for card in cards if card not in chosen]
    return chosen or list(CARDS)


def _short(name: str) -> str:
    return "".join(name.lower().split())


@dataclass(frozen=True)
class Price:
    """Of a card for an hour."""

    per_hour: float
    currency: str


def read_prices(file: Path = PRICES) -> dict[str, Price]:
    """By the name of the card. Raises UserError with file:line for a line that is none of a price."""
    prices, columns = {}, ("card", "per_hour", "currency")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: {error}; it is to be a file in UTF-8 of lines {','.join(columns)}") from error
    for row in (reader := csv.DictReader(lines)):
        where = f"{file.name}:{reader.line_num}"
        if not set(columns) <= set(row) or None in [row[key] for key in columns]:
            raise UserError(f"{where}: a line is {','.join(columns)}, and so is the first one")
        try:
            cards, price = choose_cards([row["card"]]), float(row["per_hour"])
        except UserError as error:
            raise UserError(f"{where}: {str(error).removeprefix('--card ')}") from error
        except ValueError:
            price = math.nan
        if not 0 < price < math.inf:
            raise UserError(f"{where}: per_hour {row['per_hour']!r} is no price; give a number above 0")
        if len(cards) > 1:
            raise UserError(f"{where}: {row['card']}: name one of {', '.join(card.name for card in cards)}")
        prices[cards[0].name] = Price(price, row["currency"].strip())
    return prices
