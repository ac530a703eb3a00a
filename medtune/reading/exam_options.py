"""The options of an exam question, in any published form, and the question with them as lines."""

import re
import string
from collections.abc import Sequence

from medtune.errors import Unusable
from medtune.reading.dialects import RecordPlan
from medtune.reading.keys import Reading, letter_of
from medtune.reading.values import NESTED, is_empty, parse_nested, strip_blanks


def with_options(turns: list[dict], record: dict, plan: RecordPlan, reading: Reading) -> list[dict]:
    """The turns with the options in the question, where they do not stand there already."""
    options = options_of(record, plan.keys.options)
    text_of_turns = "\n".join(turn["content"] for turn in turns)
    asks = [index for index, turn in enumerate(turns) if turn["role"] == "user"]
    if not asks or all(text in text_of_turns for text in options.values()):
        return turns
    if plan.dialect.has_turns:
        keys = ", ".join(map(repr, plan.keys.options))
        raise Unusable(
            "options apart",
            f"has {keys}, which no turn says; write them into the question, or {reading.ignoring(*plan.keys.options)}",
        )
    last_user = asks[-1]
    lines = [turns[last_user]["content"], *(f"{letter}. {text}" for letter, text in options.items())]
    return [*turns[:last_user], {"role": "user", "content": "\n".join(lines)}, *turns[last_user + 1 :]]


def options_of(record: dict, keys: Sequence[str]) -> dict[str, str]:
    """Letter and text of each option, from any of the forms that exams are published in."""
    by_letter = {letter_of(key): record[key] for key in sorted(keys, key=letter_of) if letter_of(key)}
    value = raw = by_letter or first_of(record, keys) or []
    if isinstance(value, str):
        where = ", ".join(map(repr, keys))
        value = parse_nested(value, where) if NESTED.match(value) else list(filter(None, value.splitlines()))
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        matches = list(filter(None, map(OPTION_LINE.match, value)))
        letters = "".join(match[1] or match[2] for match in matches).upper()
        if len(matches) == len(value) and string.ascii_uppercase.startswith(letters):  # not E. coli and S. aureus
            value = {letter: line.string[line.end() :] for letter, line in zip(letters, matches, strict=True)}
    if isinstance(value, dict) and all(isinstance(item, list) for item in value.values()):
        value = [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    if isinstance(value, list):
        value = dict(map(_letter_and_text, string.ascii_uppercase, value))
    options = (
        {letter: text for letter, text in value.items() if not is_empty(text)} if isinstance(value, dict) else None
    )
    if options is None or not all(isinstance(text, str | int | float) for text in options.values()):
        raise Unusable("broken options", f"the options are {raw!r:.80}; they must be letters and texts")
    return {letter: strip_blanks(str(text)) for letter, text in options.items()}


def _letter_and_text(letter: str, option: object) -> tuple[str, object]:
    """Letter and text of an option: a text, or an object with both; `letter` if it names none."""
    if not isinstance(option, dict):
        return letter, option
    if len(option) == 1 and letter_of(next(iter(option))):
        return next(iter(option.items()))
    text = first_of(option, ("value", "text", "content"))
    return str(first_of(option, ("key", "label", "id", "letter")) or letter), option if text is None else text


def first_of(row: dict, keys: Sequence[str]) -> object:
    return next((row[key] for key in keys if not is_empty(row.get(key))), None)


OPTION_LINE = re.compile(r"\s*(?:[(（]([A-Za-z])[)）]|([A-Za-z])(?:\s*[.:：、)）．]|\s))\s*")
