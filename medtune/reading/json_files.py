"""Read records in JSON (lines, one list, or a list in an object), each with its line number.

Lists are decoded piece by piece by hand: json holds a whole list with its text, ijson tells no line of a record. So a
list of any length takes about a megabyte, or what its longest record does.
"""

import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import TextIO

from medtune.errors import Unusable, UserError
from medtune.reading.byte_faults import line_fault, utf8_fault
from medtune.reading.values import JSON_TOO_MUCH, key_twice


def read_json(file: TextIO, name: str) -> Iterator[tuple[str, object]]:
    """Read by content, not by ending: a list, a list in an object, one record over several lines, or lines."""
    # Or its start: a list may be one line.
    start = file.read(1 << 16)
    first_line = start.lstrip("\ufeff \t\r\n").split("\n", 1)[0].strip()
    file.seek(0)
    chunks = iter(functools.partial(file.read, 1 << 20), "")
    if first_line.startswith("[") or _LIST_IN_OBJECT.match(start):
        yield from _read_json_list(chunks, name)
    elif first_line == "{":
        yield from _read_json_list(itertools.chain("[", chunks, "]"), name, needs_commas=False)
    else:
        yield from _read_json_lines(file, name)


def _read_json_lines(lines: Iterable[str], name: str) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text:
            continue
        source = f"{name}:{number}"
        try:
            line.encode()
            record, end = _DECODE_JSON(text)
            record = key_twice(text, record, 0, end) or record
        except JSON_TOO_MUCH:  # and what is not UTF-8, or no JSON
            end = 0
        if end == len(text):
            yield source, record
        else:
            fault = line_fault(line, number)
            for position, record in enumerate([fault] if fault else _records_of_line(line.rstrip()), 1):
                yield source if position == 1 else f"{source} (record {position} on the line)", record


def _records_of_line(line: str) -> list[object]:
    """The records of a line that is not exactly one: several joined records, or one fault."""
    records, end = [], 0
    try:
        while (start := _JSON_BLANKS.match(line, end).end()) < len(line):
            if records and line[start] != "{":
                raise json.JSONDecodeError("Extra data", line, start)
            record, end = _DECODE_JSON(line, start)
            records.append(key_twice(line, record, start, end) or record)
        return records
    except json.JSONDecodeError as error:
        return [Unusable("broken JSON", f"{error.msg} (column {error.colno}); write one whole record a line")]
    except JSON_TOO_MUCH as error:
        return [Unusable("broken JSON", f"{error}; no record is like that")]


def _read_json_list(chunks: Iterator[str], name: str, needs_commas: bool = True) -> Iterator[tuple[str, object]]:
    """Decode a list, or several joined lists, record by record, so that each has its line number."""
    text = _JsonText(chunks)
    opening = text.peek()
    try:
        while True:
            yield from _list_in_object(text, name) if opening == "{" else _list_items(text, name, needs_commas)
            if not text.peek():
                break
            if text.peek() != opening:
                raise text.error("Text after the list's end")
    except json.JSONDecodeError as error:
        if fault := text.utf8_fault():  # a GBK character may hold the byte of a backslash
            raise UserError(f"{name}:{text.line_of(error.pos)}: {fault.reason}: {fault.detail}") from None
        raise UserError(
            f"{name}:{text.line_of(error.pos)}: broken JSON: {error.msg} (column {text.column_of(error.pos)}); fix "
            "it, the rest of the file cannot be read"
        ) from None
    except UnicodeDecodeError:
        raise
    except JSON_TOO_MUCH as error:
        raise UserError(f"{name}: broken JSON behind line {text.last_line}: {error}; no record is like that") from None


def _list_items(text: "_JsonText", name: str, needs_commas: bool = True) -> Iterator[tuple[str, object]]:
    line = number_on_line = 0
    text.skip("[")
    while text.peek() != "]":
        record, start_line, fault = text.decode()
        number_on_line = number_on_line + 1 if start_line == line else 1
        line = start_line
        source = f"{name}:{line}"
        if number_on_line > 1:  # as in a list without line breaks
            source += f" (record {number_on_line} on the line)"
        yield source, fault or record
        after = text.peek()
        if after == ",":
            text.step()
        elif after != "]" and (needs_commas or after != "{"):
            raise text.error("Expecting ',' or ']'")
    text.skip("]")


# Names of the list of records in an object, and of the keys that may precede it.
_LIST_NAMES = ("data", "train", "records", "examples", "samples", "instances", "rows", "items", "dataset")

_ABOUT = (
    "version|name|title|description|license|info|meta|metadata|features|total|count|size|num_rows|date|source|language|"
    "lang|split|url|author|citation|homepage|status|code|msg|message|success|schema"
)

_LIST_IN_OBJECT = re.compile(
    rf"""[\ufeff\s]*\{{\s*(?:"(?:{_ABOUT})"\s*:\s*"""
    r"""(?:"(?:[^"\\]|\\.)*"|[\w.+-]+|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}|\[[^\[\]{}]*\])\s*,\s*)*"""
    # A list of objects that are no turns.
    rf""""(?:{"|".join(_LIST_NAMES)})"\s*:\s*\[\s*\{{\s*"(?!(?:from|role|speaker|value|content|human)")"""
)


def _list_in_object(text: "_JsonText", name: str) -> Iterator[tuple[str, object]]:
    """The records of `{"version": "1.0", "data": [...]}`."""
    text.skip("{")
    while text.peek() != "}":
        key, *_ = text.decode()
        text.skip(":")
        if text.peek() == "[" and key in _LIST_NAMES:
            yield from _list_items(text, name)
        else:
            value, line, _ = text.decode()
            if isinstance(value, list) and key not in _ABOUT.split("|") and any(isinstance(row, dict) for row in value):
                detail = f"{key!r} is a list too, of {len(value):,}; write it to a file of its own"
                yield f"{name}:{line}", Unusable("second list", detail)
        if text.peek() != "}":
            text.skip(",")
    text.skip("}")


_DECODE_JSON = json.JSONDecoder().raw_decode

_JSON_BLANKS = re.compile(r"[ \t\r\n\ufeff]*")  # and the mark of a file that was joined to another


class _JsonText:
    """A text to decode value by value, of which only the part around the next value is in memory."""

    def __init__(self, chunks: Iterator[str]):
        self._chunks = chunks
        self._buffer = ""
        self._next = 0  # index in `_buffer` of what comes next
        self._is_all = False  # nothing follows `_buffer`
        # Where `_buffer` starts in the file: line, and what that line has before it.
        self._line, self._characters_before, self._bytes_before = 1, 0, 0
        self.last_line = 0  # on which the last value started
        self._newlines, self._counted_to = 0, 0  # newlines in `_buffer` up to an index

    def peek(self) -> str:
        """Move to the next character that is not blank and return it; "" at the end."""
        while True:
            self._next = _JSON_BLANKS.match(self._buffer, self._next).end()
            if self._next < len(self._buffer) or self._is_all:
                return self._buffer[self._next : self._next + 1]
            self._read_on()

    def skip(self, character: str) -> None:
        if self.peek() != character:
            raise self.error(f"Expecting {character!r}")
        self.step()

    def step(self) -> None:
        """Go past the character that `peek` gave."""
        self._next += 1

    def decode(self) -> tuple[object, int, Unusable | None]:
        """Decode the value at the current position: the value, its line number, and its fault if it has one."""
        while True:
            try:
                value, end = _DECODE_JSON(self._buffer, self._next)
                if end < len(self._buffer) or self._is_all:  # otherwise a number might go on
                    break
            except json.JSONDecodeError as error:
                # A truncated value gives an error at its end, or where its last string starts.
                is_cut = error.pos > len(self._buffer) - 20 or error.msg.startswith("Unterminated string")
                if self._is_all or not is_cut:
                    raise
            self._read_on()
        self._newlines += self._buffer.count("\n", self._counted_to, self._next)
        self._counted_to = self._next
        fault = key_twice(self._buffer, value, self._next, end)
        try:
            self._buffer[self._next : end].encode()
        except UnicodeEncodeError:
            fault = self.utf8_fault(end)
        self._next = end
        self.last_line = self._line + self._newlines
        return value, self.last_line, fault

    def error(self, message: str) -> json.JSONDecodeError:
        return json.JSONDecodeError(message, self._buffer, self._next)

    def line_of(self, index: int) -> int:
        return self._line + self._buffer.count("\n", 0, index)

    def column_of(self, index: int) -> int:
        line_start = self._buffer.rfind("\n", 0, index) + 1
        return index - line_start + 1 + (0 if line_start else self._characters_before)

    def utf8_fault(self, end: int | None = None) -> Unusable | None:
        return utf8_fault(self._buffer, self._next, end, self._line, self._bytes_before)

    def _read_on(self) -> None:
        """Forget what is behind, and hold at least twice as much of what is ahead."""
        behind, ahead = self._buffer[: self._next], self._buffer[self._next :]
        line_start = behind.rfind("\n") + 1
        if line_start:
            self._line += behind.count("\n")
            self._characters_before = self._bytes_before = 0
        self._characters_before += len(behind) - line_start
        self._bytes_before += len(behind[line_start:].encode(errors="surrogateescape"))

        more = list(itertools.islice(self._chunks, 1))
        while more and sum(map(len, more)) < len(ahead) and (chunk := next(self._chunks, "")):
            more.append(chunk)
        self._buffer, self._next, self._is_all = "".join([ahead, *more]), 0, not more
        self._newlines = self._counted_to = 0
