"""Read the values of a record: texts, empty values, and nested values given as JSON text."""

import ast
import difflib
import functools
import json
import re
import warnings
from collections import Counter
from collections.abc import Collection
from itertools import islice

from medtune.errors import Unusable

# Too many brackets in each other, and an integer of thousands of digits.
JSON_TOO_MUCH = (RecursionError, ValueError)
_SPACED_COLON = re.compile(r'"\s+:')
# What pandas and databases write for a missing value; "None" may be what a person says, and a tool gives back.
PANDAS_WORDS = frozenset(("nan", "NaN", "<NA>", "NaT"))
ANY_NULL_WORD = PANDAS_WORDS | {"None", "NULL", "null"}
NO_TEXT = {"system": ANY_NULL_WORD, "user": PANDAS_WORDS, "assistant": ANY_NULL_WORD, "tool": frozenset()}
# Characters that show nothing, but are no white space for str.strip: zero-width, direction marks, fillers.
_BLANKS = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180e\u200b\u200c\u200d\u200e\u200f\u202a\u202b"
    "\u202c\u202d\u202e\u2060\u2061\u2062\u2063\u2064\u2066\u2067\u2068\u2069\u206a\u206b\u206c\u206d\u206e\u206f"
    "\u2800\u3164\ufeff\uffa0\ufff9\ufffa\ufffb"
)
_LEADING_BLANKS = re.compile(rf"[\s{_BLANKS}]+")
# A joiner or a variation mark may end an emoji.
_TRAILING = _BLANKS + "\ufe0e\ufe0f"
_TRAILING_BLANKS = re.compile(rf"[\s{_TRAILING}]+\Z")
_TEXT_PARTS = (None, "text", "input_text", "output_text")
NAME_KEYS = ("from", "role", "speaker")  # who says the words of a turn
NESTED = re.compile(r"\s*[\[{]")


def strip_blanks(text: str) -> str:
    """The text without white space and characters that show nothing at its ends."""
    text = text.strip()
    if not text or (text[0] not in _BLANKS and text[-1] not in _TRAILING):
        return text
    if text[0] in _BLANKS:
        text = text[_LEADING_BLANKS.match(text).end() :]
    if text and text[-1] in _TRAILING:
        kept = _TRAILING_BLANKS.sub("", text)
        # What ends an emoji stays with it.
        text = text if kept and set(text[len(kept) :]) <= set("\u200d\ufe0e\ufe0f") else kept
    return text


def is_parts(value: object) -> bool:
    """OpenAI's list of the parts of a content, and not a list of turns."""
    return (
        isinstance(value, list)
        and all(isinstance(part, dict) and "role" not in part for part in value)
        and any("type" in part for part in value)
    )


def is_turns(value: object) -> bool:
    """A list of objects of which one says who speaks."""
    return (
        isinstance(value, list)
        and all(isinstance(turn, dict) for turn in value)
        and any(key in turn for turn in value for key in NAME_KEYS)
    )


def is_empty(value: object) -> bool:
    """Whether a value is null, NaN (as pandas writes it), or an empty text or list."""
    return value is None or value != value or (not value and value is not False and value != 0)


def holds_nothing(value: object) -> bool:
    """Whether a value is empty, a word such as "nan", or a list or object that holds nothing else."""
    if isinstance(value, dict | list):
        return all(map(holds_nothing, value.values() if isinstance(value, dict) else value))
    return is_empty(value) or (isinstance(value, str) and value in PANDAS_WORDS)


def with_values(record: dict) -> dict:
    """The record without the keys that are as good as absent."""
    if all(record.values()) and float not in map(type, record.values()):
        return record  # as most are
    # `not is_empty`, without a call for each
    return {key: value for key, value in record.items() if (value and value == value) or value == 0}


def text_of(value: object, where: str, no_text: Collection[str] = ANY_NULL_WORD) -> str:
    """The stripped content of a turn, a string or a list of text parts.

    no_text: words that stand for null.
    """
    if not isinstance(value, str):
        value = _joined(value, where)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        character = f"\\u{ord(value[error.start]):04x}"
        raise Unusable("broken character", f"{where} has half a character, {character}; write it anew") from None
    text = strip_blanks(value.replace("\r\n", "\n"))
    if len(text) <= 4 and text in no_text:
        raise Unusable(
            "null value",
            f"{where} is the word {text!r}, as programs write a missing value; empty it, delete the record, or if the "
            f"word is meant, write '{text}.'",
        )
    return text


def _joined(value: object, where: str) -> str:
    """The text of a list of parts."""
    if is_turns(value):
        raise Unusable("not text", f"{where} is a list of turns; it must be a string")
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        return "".join(_text_part(part, where) for part in value)
    if value is None or value != value:
        raise Unusable("null value", f"{where} is null; write the text or delete the record")
    raise Unusable("not text", f"{where} is {kind_of(value)}; it must be a string")


def _text_part(part: dict, where: str) -> str:
    kind = part.get("type")
    if kind not in _TEXT_PARTS:
        raise Unusable("not text", f"{where} has parts of type {kind}; only text is trained on")
    text = next((part[key] for key in ("text", "value", "content") if isinstance(part.get(key), str)), None)
    if text is None:
        raise Unusable("not text", f"{where} has a text part without text")
    return text


def optional_text(record: dict, key: str) -> str:
    return "" if is_empty(record.get(key)) else text_of(record[key], f"'{key}'")


def key_twice(text: str, value: object, start: int = 0, end: int | None = None) -> Unusable | None:
    """The fault of JSON in which an object has a key twice; json silently takes the last one.

    There are then more colons than keys. json's own hook for objects would take as long as all of the decoding.
    """
    n_keys, values = 0, [value]
    for item in values:  # which grows
        kind = type(item)
        if kind is str:
            continue
        if kind is dict:
            n_keys += len(item)
            values += item.values()
        elif kind is list:
            values += item
    end = len(text) if end is None else end
    if text.count(":", start, end) == n_keys:
        return None
    if text.count('":', start, end) == n_keys and not _SPACED_COLON.search(text, start, end):
        return None  # the other colons stand in strings
    try:
        json.JSONDecoder(object_pairs_hook=_object_of).raw_decode(text, start)
    except Unusable as fault:
        return fault
    return None


def _object_of(pairs: list[tuple[str, object]]) -> dict:
    if len(record := dict(pairs)) < len(pairs):
        key, n = Counter(key for key, _ in pairs).most_common(1)[0]
        raise Unusable("key twice", f"{key!r} stands {n} times in one object; keep one of them")
    return record


def parse_nested(value: object, where: str) -> object:
    """Decode a nested value that csv or parquet holds as a JSON string, or pandas as a Python literal."""
    if not isinstance(value, str):
        return value
    if value.strip() in ANY_NULL_WORD - {"null"}:
        raise Unusable(
            "null value", f"{where} is the word {value!r}, as programs write a missing value; empty it or take it out"
        )
    try:
        decoded = json.loads(value)
        if fault := key_twice(value, decoded):
            raise fault
        return decoded
    except json.JSONDecodeError as error:
        detail = f"{where} is not JSON: {error.msg} (character {error.pos + 1}); write it with json.dumps"
    except JSON_TOO_MUCH as error:
        raise Unusable("broken JSON", f"{where}: {error}") from None
    if NESTED.match(value):
        try:
            with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
                # numpy writes no commas between the objects of an array
                return ast.literal_eval(re.sub(r"\}\n \{", "}, {", value.strip()))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass
    raise Unusable("broken JSON", detail)


def kind_of(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def quoted(keys: Collection[str]) -> str:
    listed = ", ".join(repr(key) for key in islice(keys, 30))
    more = f" and {len(keys) - 30:,} more" if len(keys) > 30 else ""
    return f"the keys {listed}{more}" if keys else "no keys"


def nearest(keys: Collection[str], known: tuple[str, ...], cutoff: float = 0.75) -> str:
    """`; is 'histroy' meant as 'history'?` for each key of a record that is close to a known absent one."""
    absent = tuple(key for key in known if key not in keys)
    pairs = ((key, _closest(key, absent, cutoff)) for key in keys if key not in known)
    return "".join(f"; is {key!r} meant as {near!r}?" for key, near in pairs if near)


_ALSO_CALLED = {
    **dict.fromkeys(
        ("chat_history", "dialogue_history", "dialog_history", "conversation_history", "历史", "历史对话", "对话历史"),
        "history",
    ),
    **dict.fromkeys(("system_message", "sys_prompt", "系统", "系统提示", "系统提示词"), "system"),
}


@functools.lru_cache(maxsize=4000)
def suspects(keys: tuple[str, ...], present: tuple[str, ...], optional: tuple[str, ...]) -> str:
    """Hints for unread keys: misspelt ones, and those that are known under another name."""
    others = ((key, _ALSO_CALLED.get(key.strip().lower())) for key in present)
    named = [f"; is {key!r} meant as {name!r}?" for key, name in others if name in optional and name not in keys]
    return "".join(named) or nearest(keys, optional, cutoff=0.85)


@functools.lru_cache(maxsize=1000)
def _closest(key: str, known: tuple[str, ...], cutoff: float) -> str | None:
    return next(iter(difflib.get_close_matches(key.lower(), known, 1, cutoff)), None)
