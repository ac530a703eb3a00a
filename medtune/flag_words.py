"""The words behind a flag: what they mean, and what is wrong with them in one line."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from transformers.hf_argparser import string_to_bool

from medtune.errors import UserError

WITH_COMMAS = ("--target_modules", "--modules_to_save", "--ignore_keys")


def one_bool(flag: str, values: list[str], choices: str = "True or False") -> bool:
    """The value of a boolean flag; a flag without a value is True."""
    try:
        (text,) = values or ["True"]
        return string_to_bool(text)
    except (ValueError, argparse.ArgumentTypeError):
        raise UserError(f"{flag} {' '.join(values)}: give {choices}") from None


def check_json(flag: str, value: str) -> None:
    """Settings in JSON are parsed deep in transformers, which does not say which flag was wrong."""
    if value.startswith("{"):
        try:
            json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"{flag} {value}: not JSON ({error}); quote the keys and write true or false") from None


def check_separators(flag: str, values: list[str], takes_several: bool) -> None:
    """Refuse a list whose words are joined by the other of comma and blank. A word may be a path with a comma."""
    if flag in WITH_COMMAS and len(values) > 1:
        joined = ",".join(value.strip(",") for value in values)
        raise UserError(f"{flag} {' '.join(values)}: the names are joined by commas: {flag} {joined}")
    joined = [value for value in values if "," in value and value[0] not in "[{" and not Path(value).exists()]
    if takes_several and joined and flag != "--report_to":  # which takes both
        apart = " ".join(values).replace(",", " ").split()
        raise UserError(f"{flag} {' '.join(values)}: several are given with blanks: {flag} {' '.join(apart)}")


def values_by_flag(argv: Sequence[str]) -> dict[str, str]:
    """The values of each flag, joined by spaces; of a repeated flag the last ones, as in argparse."""
    values: dict[str, str] = {}
    flag = ""
    for word in argv:
        if word.startswith("--"):
            flag, _, values[flag] = word.partition("=")
        elif flag:
            values[flag] = f"{values[flag]} {word}".strip()
    return values


def check_share(flag: str, values: list[str]) -> None:
    """From 1 on, transformers would take a share of the steps for their number."""
    try:
        (share,) = map(float, values)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise UserError(f"{flag} {' '.join(values)}: give a share of the steps from 0 to below 1")


def flag_or_path(text: str) -> str | bool | None:
    """`--resume_from_checkpoint` takes True, False or a path, and reaches us as text."""
    lowered = text.strip().lower()
    if lowered in ("true", "1", "yes"):
        return True
    if lowered in ("false", "0", "no", "none", ""):
        return None
    return text
