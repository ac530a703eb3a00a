"""Split and sample records by seed: training and held-out parts."""

import hashlib
import random
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

from medtune.errors import UserError
from medtune.reading.records import Dialogue, Document, Pair, T


def choose_part(
    records: Sequence[T],
    part: Literal["train", "eval"],
    held_out: bool,
    max_train_samples: int | None,
    max_eval_samples: int | None,
    seed: int,
) -> list[T]:
    """The records of one part, sampled by the seed.

    held_out: the evaluation part is held out of the training files.
    """
    if held_out:
        # As many as asked for, but never more than a tenth of the data.
        n_eval = max(1, min(max_eval_samples or len(records), len(records) // 10))
        train_part, eval_part = split_holdout(records, n_eval, seed, "--max_eval_samples")
        records = train_part if part == "train" else eval_part
    return take_samples(records, max_train_samples if part == "train" else max_eval_samples, seed)


def take_samples(items: Sequence[T], max_samples: int | None, seed: int) -> list[T]:
    """A seeded random sample of at most `max_samples` items, in their order; None takes all."""
    if max_samples is None or max_samples >= len(items):
        return list(items)
    chosen = random.Random(seed).sample(range(len(items)), max_samples)
    return [items[index] for index in sorted(chosen)]


def split_holdout(records: Sequence[T], size: int | float, seed: int, flag: str) -> tuple[list[T], list[T]]:
    """Split into (train, held out), both in the order given; no question or text is on both sides.

    size: how many to hold out (int), or which share of all (float below 1). Fewer are held out where the records that
        share a question do not fit.
    seed: decides which questions come first; the order of the records does not matter.
    Raises UserError, naming `flag`, where a side would be empty.
    """
    by_question: dict[str, list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        by_question[_question_key(record)].append(index)

    n_holdout = size if isinstance(size, int) else max(1, round(size * len(records)))
    held_out: set[int] = set()
    for question in sorted(by_question, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest()):
        if len(held_out) + len(by_question[question]) <= n_holdout:
            held_out.update(by_question[question])

    if not held_out or len(held_out) == len(records):
        raise UserError(
            f"{flag} {size}: cannot hold out {n_holdout} of {len(records)} records "
            f"({len(by_question)} of them different) and train on the rest; "
            "lower it or give validation files of their own"
        )
    train = [record for index, record in enumerate(records) if index not in held_out]
    return train, [records[index] for index in sorted(held_out)]


def _question_key(record: Dialogue | Document | Pair) -> str:
    """The first user turn, or the text, without case, character width, punctuation and spaces."""
    if isinstance(record, Document):
        question = record.text
    else:
        question = next(message["content"] for message in record.messages if message["role"] == "user")
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", question).casefold())
