"""Clean a record: HTML tags, control characters, Unicode forms, repeated punctuation, superfluous spaces."""

import dataclasses
import re
import unicodedata
from collections import Counter
from collections.abc import Callable

from medtune.errors import Unusable
from medtune.reading.html_text import without_html
from medtune.reading.personal_data import mask_personal_data
from medtune.reading.records import Dialogue, Document, Feedback, Pair

Record = Dialogue | Pair | Feedback | Document

_CONTROL = re.compile(
    "\r\n|[\0-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u2028-\u202e\u2060-\u2064\u2066-\u2069\ufeff\ufff9-\ufffb]"
)
_LINE_ENDS = dict.fromkeys(("\r\n", "\r", "\x0b", "\x0c", "\x85", "\u2028", "\u2029"), "\n")


def without_control_characters(text: str) -> str:
    """Remove control characters, direction marks and zero-width spaces, but keep the joiners of emoji."""
    return _CONTROL.sub(lambda match: _LINE_ENDS.get(match[0], ""), text)


def in_nfc(text: str) -> str:
    """Unicode NFC: one code for a character with its accents. Full-width characters stay what they are."""
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


# Two of a Chinese mark are one too many; of an ASCII mark three are, since code has two.
_REPEATED = re.compile(r"([，、；：。！？])\1+|([!?,;~～])\2{2,}|(\.{3})\.+|(…{2})…+|(—{2})—+")


def without_repeated_punctuation(text: str) -> str:
    return _REPEATED.sub(lambda match: match[match.lastindex], text)


_LINE_END_BLANKS = re.compile(r"(?<![ \t\u3000])[ \t\u3000]+(?=\n)")
_WIDE_GAPS = re.compile(r"(?<=\S)[ \t\u3000]{2,}")
_EMPTY_LINES = re.compile(r"\n{3,}")


def without_idle_blanks(text: str) -> str:
    """One space between words, none at a line's end, at most one empty line; indentation stays."""
    text = _LINE_END_BLANKS.sub("", text.replace("\u00a0", " "))
    return _EMPTY_LINES.sub("\n\n", _WIDE_GAPS.sub(" ", text))


# HTML first: an entity may stand for anything that the other steps look for.
STEPS: dict[str, Callable[[str], str]] = {
    "HTML remains": without_html,
    "control characters": without_control_characters,
    "Unicode NFC": in_nfc,
    "repeated punctuation": without_repeated_punctuation,
    "idle blanks": without_idle_blanks,
}
STEPS_IN_CODE = ("control characters", "Unicode NFC")
# In a dialogue a whole page is what was asked for, and no remains of one.
_PAGE = re.compile(r"<!doctype\b|<html\b", re.IGNORECASE)


class Cleaner:
    """Cleans records, and counts those in which each step changed something."""

    def __init__(self, mask: bool):
        self.changed: Counter[str] = Counter()
        self.masked: Counter[str] = Counter()
        self._mask = mask
        self._changes: set[str] = set()

    def __call__(self, record: Record) -> Record:
        """Raises Unusable where nothing is left of a text, or two replies are the same now."""
        self._changes = set()
        if isinstance(record, Document):
            cleaned = Document(self._words(record.text, "the text", pages_stay=False), record.source)
        else:
            messages = [self._message(message, f"turn {n}") for n, message in enumerate(record.messages, 1)]
            messages = [m for m in messages if m["content"] or m.get("tool_calls") or m["role"] == "tool"]
            cleaned = dataclasses.replace(record, messages=messages)
        if isinstance(cleaned, Pair):
            chosen, rejected = (self._words(getattr(record, name), f"{name} reply") for name in ("chosen", "rejected"))
            if chosen == rejected:
                raise Unusable("same replies after cleaning", "chosen and rejected differed in what was cleaned only")
            cleaned = dataclasses.replace(cleaned, chosen=chosen, rejected=rejected)
        if isinstance(cleaned, Feedback):
            cleaned = dataclasses.replace(cleaned, reply=self._words(record.reply, "the reply"))
        self.changed.update(self._changes)
        return cleaned

    def _message(self, message: dict, where: str) -> dict:
        if message["role"] == "tool":  # a machine's words, which may be code
            return message | {"content": self._without_personal_data(message["content"])}
        is_needed = message["role"] != "system" and not message.get("tool_calls")
        cleaned = message | {"content": self._words(message["content"], f"{where} ({message['role']})", is_needed)}
        if self._mask and message.get("tool_calls"):
            cleaned["tool_calls"] = self._masked_values(message["tool_calls"])
        return cleaned

    def _words(self, text: str, where: str, is_needed: bool = True, pages_stay: bool = True) -> str:
        parts = text.split("```")
        for number, part in enumerate(parts):
            is_code = number % 2 == 1 or (pages_stay and _PAGE.search(part))
            for name in STEPS_IN_CODE if is_code else STEPS:
                before, part = part, STEPS[name](part)
                if part != before:
                    self._changes.add(name)
            parts[number] = part
        cleaned = self._without_personal_data("```".join(parts)).strip()
        if is_needed and not cleaned:
            raise Unusable("empty after cleaning", f"{where} was {text[:40]!r}")
        return cleaned

    def _without_personal_data(self, text: str) -> str:
        if self._mask:
            text, kinds = mask_personal_data(text)
            self.masked.update(kinds)
        return text

    def _masked_values(self, value: object) -> object:
        if isinstance(value, dict):
            return {key: self._masked_values(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._masked_values(item) for item in value]
        if isinstance(value, str | int) and not isinstance(value, bool):
            text = self._without_personal_data(str(value))
            return value if text == str(value) else text
        return value
