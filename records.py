"""The data contract: texts and dialogues in one form whatever the dialect and file, faults named by `file:line`.

    files, unread = find_files("data/finetune", "--train_file_dir")
    dialogues, report = load_dialogues(files, on_bad_data="error")
    train, held_out = split_holdout(dialogues, 100, seed=42, flag="--max_eval_samples")

A fault in one record is a `BadRecord`, which a run refuses, or drops and counts. A fault after which the rest
of a file cannot be read is a `UserError` always: nobody could count what was lost.
"""

import csv
import functools
import gzip
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import time
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO, TypeVar

from filelock import FileLock
from loguru import logger

from dialects import (
    RecordPlan,
    check_other_forms,
    dialogue_plan,
    pair_plan,
    planned,
    prompt_plan,
    tools_of,
    with_options,
)
from errors import Unusable, UserError
from raw_files import BLOCK, is_text, misnamed, read_start, utf16_without_mark
from record_keys import Reading, check_media, check_reply_keys, sort_keys, split_keys
from record_values import (
    JSON_TOO_MUCH,
    holds_nothing,
    is_empty,
    key_twice,
    kind_of,
    nearest,
    optional_text,
    quoted,
    text_of,
)

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

    from arguments import DataArguments

T = TypeVar("T")

_IMPORTED_AT = time.time()


# --------------------------------------------------------------------------------------------------
# What a record becomes
# --------------------------------------------------------------------------------------------------


@dataclass(slots=True)  # frozen, a record would take as long to make as to check
class Dialogue:
    """One usable dialogue: perhaps a system turn, then user, tool and assistant turns, a reply the last.

    A message is `{"role": "system" | "user" | "assistant" | "tool", "content": str}`; an assistant's may add
    `"tool_calls": [{"name": str, "arguments": dict}]`, and `"weight": 0` where it is there to be read and not learned.
    Contents are stripped: a space between the assistant header and the reply gives other tokens in training than in
    generation. Line ends are `\\n`.
    """

    messages: list[dict]
    tools: list[dict] | None
    source: str


@dataclass(slots=True)
class Document:
    """One text to continue pretraining on, stripped, in one piece."""

    text: str
    source: str


@dataclass(slots=True)
class Pair:
    """Two replies to one prompt: messages as in a dialogue, the person's turn the last.

    `margin` is by how much the chosen reply is the better one, where the record says so.
    """

    messages: list[dict]
    chosen: str
    rejected: str
    margin: float | None
    source: str
    tools: list[dict] | None = None


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used: where it stands, a category to count by, and what to mend."""

    source: str
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}: {self.detail}"


@dataclass
class Report:
    """How many records were read, and how many dropped for which reason.

    A later step adds its own drops, or where it works on a part of the records starts its own `Report(read)`.
    """

    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what was met in them, a line each

    @property
    def kept(self) -> int:
        return self.read - self.dropped.total()

    def drop(self, bad: BadRecord) -> None:
        """Count one of the records read as dropped; the first three of each reason are kept as examples."""
        self.dropped[bad.reason] += 1
        examples = self.examples.setdefault(bad.reason, [])
        if len(examples) < 3:
            examples.append(f"{bad.source}: {bad.detail}")

    def summary(self) -> str:
        """One line, such as `kept 985 of 1000 (12 empty reply, 3 broken JSON)`."""
        line = f"kept {self.kept} of {self.read}"
        if self.dropped:
            line += f" ({', '.join(f'{count} {reason}' for reason, count in self.dropped.most_common())})"
        return line

    def as_dict(self) -> dict:
        """The report as JSON values, for the cache; `from_dict` reads it back."""
        return {"read": self.read, "dropped": dict(self.dropped), "examples": self.examples, "notes": self.notes}

    @classmethod
    def from_dict(cls, values: dict) -> "Report":
        return cls(values["read"], Counter(values["dropped"]), values["examples"], values["notes"])


# --------------------------------------------------------------------------------------------------
# Finding files
# --------------------------------------------------------------------------------------------------

RECORD_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
TEXT_ENDINGS = (".txt", *RECORD_ENDINGS)


def find_files(path: str | Path, flag: str, endings: Sequence[str] = RECORD_ENDINGS) -> tuple[list[Path], list[Path]]:
    """List the files to read at `path` (a file, or a folder and all below it), and those left unread.

    Both lists are sorted; hidden files are in neither. A text file may be compressed, as `train.jsonl.gz`.
    Raises UserError, naming `flag`, if none can be read.
    """
    if not str(path):
        raise UserError(f"{flag} is empty: name a file or folder")
    path = Path(path)
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = []
        # os.walk rather than rglob: data folders on servers are often linked in from another disk.
        for folder, subfolders, names in os.walk(path, followlinks=True):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            for link in (link for name in subfolders if (link := Path(folder, name)).is_symlink()):
                if Path(folder).resolve().is_relative_to(link.resolve()):
                    raise UserError(f"{flag} {path}: {link} leads back to a folder that it is in; remove this link")
            found += [Path(folder, name) for name in names if not name.startswith(".")]
    else:
        raise UserError(f"{flag} {path}: no such file or folder")

    files = sorted(file for file in found if ending_of(file) in endings)
    unread = sorted(set(found).difference(files))
    if not files:
        what_is_there = f"found only {_some(unread)}" if unread else "the folder is empty"
        raise UserError(f"{flag} {path}: {what_is_there}; files that end in {', '.join(endings)} are read")
    if dangling := [file for file in files if not file.exists()]:
        raise UserError(f"{flag} {path}: {dangling[0]} is a link to a file that is not there; copy or download it")
    return files, unread


def ending_of(path: Path) -> str:
    """The suffix that says how a file is read: the one before `.gz`, which only text files have."""
    suffix, inner = path.suffix.lower(), Path(path.stem).suffix.lower()
    return inner if suffix == ".gz" and inner != ".parquet" else suffix


def content_fingerprint(files: Sequence[Path]) -> str:
    """SHA-256 over the names (as `Dialogue.source` shows them) and the bytes of the files, in their order."""
    whole = hashlib.sha256()
    for path in files:
        content = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                content.update(block)
        whole.update(f"{shown(path)}\0{content.hexdigest()}\n".encode())
    return whole.hexdigest()


def shown(path: Path) -> str:
    """The path as messages show it: relative to the working directory where it lies below it."""
    path = path.absolute()
    return (path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path).as_posix()


def _some(paths: Sequence[Path]) -> str:
    """The first five names, and how many more there are."""
    names = ", ".join(path.name for path in paths[:5])
    return names if len(paths) <= 5 else f"{names} and {len(paths) - 5} more"


# --------------------------------------------------------------------------------------------------
# Reading files: each reader yields (source, record), or (source, Unusable) where the record is broken
# --------------------------------------------------------------------------------------------------


def read_raw(path: Path, encoding: str = "utf-8-sig") -> Iterator[tuple[str, object]]:
    """Read the records of one file as they are: (source, record), or (source, Unusable) for a broken one.

    Never holds more than about a megabyte or the longest record. Raises UserError where the rest is unreadable.
    """
    name = shown(path)
    if path.is_file() and not path.stat().st_size:
        yield f"{name}:1", Unusable("empty file", "it has no bytes; copy or download it again, or delete it")
    elif ending_of(path) == ".parquet":
        yield from _read_parquet(path, name)
    else:
        with open_text(path, encoding) as file:
            yield from _TEXT_READERS[ending_of(path)](file, name)


@contextmanager
def open_text(path: Path, encoding: str = "utf-8-sig") -> Iterator[TextIO]:
    """Open a file so that a byte that is not UTF-8 spoils only its own record, and only `\\n` ends a line.

    Where most lines of the first megabyte end with `\\r` alone, that ends a line too, and is read as `\\n`. Raises
    UserError where the file is not what its name says, and in the block where it is damaged or not in the encoding.
    """
    name, ending = shown(path), ending_of(path)
    start = read_start(path, name)
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    is_compressed = start.startswith(b"\x1f\x8b")
    if opened is gzip.open and not is_compressed and (misnamed(start) or is_text(start)):
        raise UserError(f"{name}: {misnamed(start) or 'not compressed; take .gz off its name'}")
    try:
        if opened is gzip.open:
            with gzip.open(path) as file:
                start = file.read(BLOCK)
        head = start[: 1 << 16].decode(encoding, errors="replace")
        fault = misnamed(start, ending not in TEXT_ENDINGS) or _other_text(head, ending)
        if not fault and encoding == "utf-8-sig" and (unmarked := utf16_without_mark(start)):
            fault = f"{unmarked} without its mark; convert it: `iconv -f {unmarked} -t UTF-8 OLD > NEW`"
        if fault:
            raise UserError(f"{name}: {fault}")
        newline = None if _has_old_line_ends(start, encoding, ending) else "\n"
        with opened(path, "rt", encoding=encoding, errors="surrogateescape", newline=newline) as file:
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{name}: not a whole gzip file ({error}); copy or download it again") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not {encoding} ({error.reason}); convert the file to UTF-8") from None


# Names of columns, by which the first line of a table is known.
_COLUMN_NAMES = frozenset((
    "text", "content", "title", "system", "history", "tools", "margin", "messages", "conversations", "prompt",
    "completion", "query", "response", "ask", "instruction", "input", "output", "question", "answer", "chosen",
    "rejected", "response_chosen", "response_rejected", "good_answer", "bad_answer", "id", "source", "label",
    "department", "问题", "回答", "提问", "答案", "标题", "科室",
))  # fmt: skip
_TABLES = [
    {"question", "answer"}, {"instruction", "output"}, {"prompt", "completion"}, {"query", "response"},
    {"chosen", "rejected"}, {"response_chosen", "response_rejected"},
]  # fmt: skip
_SEPARATORS = (",", ";", "\t", "|", "，", "；")
_JSON_OBJECT = re.compile(r'[\s\ufeff]*\[?\s*\{\s*"(?:[^"\\]|\\.)*"\s*:')


def _has_old_line_ends(start: bytes, encoding: str, ending: str) -> bool:
    """Whether `\\r` alone ends the lines, as on old Macs; the cells of such a table may hold any number of `\\n`."""
    if b"\r" not in start:
        return False
    text = start.decode(encoding, errors="replace")
    if ending in (".csv", ".tsv") and re.match(r"[^\r\n]+\r(?![\r\n])", text):
        return True
    return text.count("\r") - text.count("\r\n") > text.count("\n")


def _other_text(text: str, ending: str) -> str:
    """What a text is that the file's ending does not say, and what to do; "" where its start does not tell."""
    lines = [line for raw in re.split(r"[\r\n]+", text) if (line := raw.strip().lstrip("\ufeff"))]
    is_json = _JSON_OBJECT.match(text)
    if ending in (".csv", ".tsv") and is_json:
        return "JSON, not a table; end its name in .jsonl"
    if ending == ".txt" and is_json and (lines[0] in "[{" or all(line[0] in "[{" for line in lines)):
        return "JSON, not plain text; end its name in .jsonl"
    if lines and ending in (".txt", ".jsonl", ".json") and not any(line[0] in "[{" for line in lines):
        names = _header_names(lines[0], _separator(*lines[:2]))
        n_known = sum(name in _COLUMN_NAMES for name in names)
        if len(names) > 1 and n_known >= (len(names) if ending == ".txt" else 1):
            return "a table with column names; end its name in .csv"
    return ""


def _header_names(line: str, separator: str) -> list[str]:
    return [cell.strip('\ufeff" \t').lower() for cell in line.strip("\r\n").split(separator)]


def _separator(header: str, row: str = "") -> str:
    """What separates the cells: that by which most known names are in the header, or which is all that splits it."""
    header = re.sub(r'"[^"]*"', lambda cell: '""' if set(cell[0]) & set(_SEPARATORS) else cell[0], header)
    n_known = {mark: len(_COLUMN_NAMES.intersection(_header_names(header, mark))) for mark in _SEPARATORS}
    best = max(_SEPARATORS, key=n_known.get)
    if n_known[best] or "," in header:
        return best
    return next((mark for mark in _SEPARATORS if mark in header and mark in row), ",")


def _read_json(file: TextIO, name: str) -> Iterator[tuple[str, object]]:
    """Read by content, not ending: a list, perhaps in an object; from a lone `{` one long record; else lines."""
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
            fault = _line_fault(line, number)
            for position, record in enumerate([fault] if fault else _records_of_line(line.rstrip()), 1):
                yield source if position == 1 else f"{source} (record {position} on the line)", record


def _records_of_line(line: str) -> list[object]:
    """The records of a line that is not one: those of files that were joined, or the fault of all."""
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
    """Decode a list, or several that were joined, record by record, so that each knows the line on which it starts."""
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
            f"{name}:{text.line_of(error.pos)}: broken JSON: {error.msg} (column {text.column_of(error.pos)}); mend "
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


# What the list of all records is called where it lies in an object, and what may stand before it there.
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
    """A text to decode value by value, of which only the part around the next one is held."""

    def __init__(self, chunks: Iterator[str]):
        self._chunks = chunks
        self._held = ""
        self._next = 0  # index in `_held` of what comes next
        self._is_all = False  # nothing follows `_held`
        # Where `_held` starts in the file: line, and what that line has before it.
        self._line, self._characters_before, self._bytes_before = 1, 0, 0
        self.last_line = 0  # on which the last value started
        self._newlines, self._counted_to = 0, 0  # newlines in `_held` up to an index

    def peek(self) -> str:
        """The next character that is not blank, "" at the end; what comes next starts with it."""
        while True:
            self._next = _JSON_BLANKS.match(self._held, self._next).end()
            if self._next < len(self._held) or self._is_all:
                return self._held[self._next : self._next + 1]
            self._read_on()

    def skip(self, character: str) -> None:
        if self.peek() != character:
            raise self.error(f"Expecting {character!r}")
        self.step()

    def step(self) -> None:
        """Go past the character that `peek` gave."""
        self._next += 1

    def decode(self) -> tuple[object, int, Unusable | None]:
        """The value of which `peek` gave the first character, its line, and the first byte in it that is not UTF-8."""
        while True:
            try:
                value, end = _DECODE_JSON(self._held, self._next)
                if end < len(self._held) or self._is_all:  # otherwise a number might go on
                    break
            except json.JSONDecodeError as error:
                # What is cut off gives an error at its end, or where its last string starts.
                is_cut = error.pos > len(self._held) - 20 or error.msg.startswith("Unterminated string")
                if self._is_all or not is_cut:
                    raise
            self._read_on()
        self._newlines += self._held.count("\n", self._counted_to, self._next)
        self._counted_to = self._next
        fault = key_twice(self._held, value, self._next, end)
        try:
            self._held[self._next : end].encode()
        except UnicodeEncodeError:
            fault = self.utf8_fault(end)
        self._next = end
        self.last_line = self._line + self._newlines
        return value, self.last_line, fault

    def error(self, message: str) -> json.JSONDecodeError:
        return json.JSONDecodeError(message, self._held, self._next)

    def line_of(self, index: int) -> int:
        return self._line + self._held.count("\n", 0, index)

    def column_of(self, index: int) -> int:
        line_start = self._held.rfind("\n", 0, index) + 1
        return index - line_start + 1 + (0 if line_start else self._characters_before)

    def utf8_fault(self, end: int | None = None) -> Unusable | None:
        return _utf8_fault(self._held, self._next, end, self._line, self._bytes_before)

    def _read_on(self) -> None:
        """Forget what is behind, and hold at least twice as much of what is ahead."""
        behind, ahead = self._held[: self._next], self._held[self._next :]
        line_start = behind.rfind("\n") + 1
        if line_start:
            self._line += behind.count("\n")
            self._characters_before = self._bytes_before = 0
        self._characters_before += len(behind) - line_start
        self._bytes_before += len(behind[line_start:].encode(errors="surrogateescape"))

        more = list(itertools.islice(self._chunks, 1))
        while more and sum(map(len, more)) < len(ahead) and (chunk := next(self._chunks, "")):
            more.append(chunk)
        self._held, self._next, self._is_all = "".join([ahead, *more]), 0, not more
        self._newlines = self._counted_to = 0


def csv_separator(path: Path, encoding: str = "utf-8-sig") -> str:
    """The character between the cells of a table, as its first lines show."""
    with open_text(path, encoding) as file:
        return _open_table(file)[1]


def _open_table(file: TextIO) -> tuple[Iterator[str], str, int]:
    """The lines from the header on, what separates their cells, and how many lines stand before."""
    first = list(itertools.islice(file, 2))
    named = re.fullmatch(r'"?sep=(.)"?\s*', "".join(first[:1]))  # as Excel writes
    n_before = 1 if named else 0
    return itertools.chain(first[n_before:], file), named[1] if named else _separator(*(first or [""])), n_before


def _read_csv(file: TextIO, name: str) -> Iterator[tuple[str, object]]:
    # A dialogue in one cell passes the module's limit of 128 KiB; a cell as long as this is an unclosed quote.
    csv.field_size_limit(1 << 24)
    lines, separator, n_before = _open_table(file)
    taken: list[str] = []
    # strict: otherwise a quote that is never closed silently takes the rest of the file into one cell.
    rows = csv.reader(_noted(lines, taken), strict=True, delimiter=separator)
    start = n_before
    try:
        header = next(rows, [])
        if fault := _utf8_fault("".join(taken)):
            raise UserError(f"{name}:1: {fault.reason}: {fault.detail}")
        if twice := next((column for column in header if column and header.count(column) > 1), None):
            raise UserError(f"{name}:1: two columns are called {twice!r}; rename one or take it out")
        columns = _lowered(header)
        names = {form for name in _COLUMN_NAMES.union(columns) for form in (name, name.capitalize(), name.upper())}
        start += rows.line_num
        taken.clear()
        for cells in rows:
            text = "".join(taken)
            source, fault = f"{name}:{start + 1}", _line_fault(text, start + 1)
            start = n_before + rows.line_num
            taken.clear()
            if cells and cells[0] in names and _is_header(_lowered(cells), columns):
                if _lowered(cells) != columns:
                    raise UserError(f"{source}: other column names, as in files that were joined; make two files of it")
                detail = "the column names stand here again, as in files that were joined; delete the line"
                yield source, Unusable("second header", detail)
            elif len(cells) == len(header):
                yield source, fault or dict(zip(header, cells, strict=True))
            elif cells:  # a blank line has none
                separators = "commas" if separator == "," else repr(separator)
                detail = f"{len(cells)}, where the header has {len(header)}; quote cells that contain {separators}"
                yield source, fault or Unusable("wrong number of cells", detail)
    except csv.Error as error:
        raise UserError(
            f"{name}:{start + 1}: broken CSV: {error}; close each quote and double the quotes inside a cell, "
            "the rest of the file cannot be read"
        ) from None


def _lowered(cells: list[str]) -> list[str]:
    return [cell.strip().lower() for cell in cells]


def _is_header(cells: list[str], columns: list[str]) -> bool:
    """Whether these cells are the columns' names, in any order, or names of columns that another table has."""
    if sorted(cells) == sorted(columns):
        return True
    return _COLUMN_NAMES.issuperset(cells) and any(names <= set(cells) for names in _TABLES)


def _noted(lines: Iterable[str], taken: list[str]) -> Iterator[str]:
    """The lines, each added to `taken` as it is handed on, without the marks of files that were joined."""
    for line in lines:
        taken.append(line)
        yield line.lstrip("\ufeff") if line[0] == "\ufeff" else line


def _read_parquet(path: Path, name: str) -> Iterator[tuple[str, object]]:
    import pyarrow
    import pyarrow.parquet

    start = read_start(path, name)
    if not start.startswith(b"PAR1"):
        what = "text, not parquet; end its name in .jsonl or .csv, as it is" if is_text(start) else "not a parquet file"
        raise UserError(f"{name}: {misnamed(start) or f'{what}; copy or download it again'}")
    number = 0
    try:
        # By default pyarrow 26 holds the whole file.
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            if twice := _twice_in(file.schema_arrow):
                raise UserError(f"{name}: two columns are called {twice!r}; rename one or take it out")
            for batch in file.iter_batches(batch_size=1000):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{name}:row {number}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{name}: not a whole parquet file ({error}); copy or download it again") from None


def _twice_in(fields: Iterable["pyarrow.Field"]) -> str | None:
    """The first name that two columns have, or two fields of one struct; pyarrow gives one of their values."""
    fields = list(fields)
    names = [field.name for field in fields]
    twice = next((name for name in names if names.count(name) > 1), None)
    return twice or next(
        filter(None, (_twice_in(map(field.type.field, range(field.type.num_fields))) for field in fields)), None
    )


def _read_text(file: TextIO, name: str) -> Iterator[tuple[str, object]]:
    """A document a line, as a record with `text`; blank lines are none."""
    for number, line in enumerate(file, 1):
        if line[0] in "\ufeffv":  # the mark or the pointer of a file that was joined to another
            line = line.lstrip("\ufeff")
            if line.startswith("version https://git-lfs.github.com/spec/v"):
                raise UserError(f"{name}:{number}: {misnamed(line.encode())}")
        if line.strip():
            yield f"{name}:{number}", _line_fault(line, number) or {"text": line}


_TEXT_READERS = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".txt": _read_text,
}


def _line_fault(text: str, first_line: int) -> Unusable | None:
    """What is wrong with the bytes of a text that has no form by which it would show."""
    try:
        if 0 not in text.encode():  # the fastest search of all
            return None
    except UnicodeEncodeError:
        return _utf8_fault(text, first_line=first_line)
    line = first_line + text.count("\n", 0, text.index("\0"))
    return Unusable("NUL bytes", f"in line {line}, as a full disk or a crash leaves; copy or download the file again")


# The first bytes of a UTF-8 character, as `surrogateescape` reads them.
_CUT_CHARACTER = re.compile("[\udcc2-\udcf4][\udc80-\udcbf]{0,2}")


def _utf8_fault(
    text: str, start: int = 0, end: int | None = None, first_line: int = 1, bytes_before: int = 0
) -> Unusable | None:
    """Name the first byte of `text[start:end]` that was not UTF-8 in the file, if there is one.

    `first_line` is the line on which `text` starts, `bytes_before` what that line has before it.
    """
    try:
        text[start:end].encode()
        return None
    except UnicodeEncodeError as error:
        position = start + error.start
    line_start = text.rfind("\n", 0, position) + 1
    line = first_line + text.count("\n", 0, line_start)
    byte = len(text[line_start:position].encode(errors="surrogateescape")) + 1 + (0 if line_start else bytes_before)
    value = ord(text[position]) - 0xDC00
    if _CUT_CHARACTER.fullmatch(text, position):
        return Unusable(
            "cut off", f"the file ends within a character, at byte {byte} of line {line}; copy or download it again"
        )
    encoding = "UTF-16" if value == 0xFF else "GB18030"  # FF opens Windows' UTF-16; GB18030 includes GBK
    return Unusable(
        "not UTF-8",
        f"byte {byte} of line {line} is {value:#04x}; convert the file, probably by "
        f"`iconv -f {encoding} -t UTF-8 OLD > NEW`",
    )


# --------------------------------------------------------------------------------------------------
# From records to dialogues
# --------------------------------------------------------------------------------------------------


def read_dialogues(files: Sequence[Path], reading: Reading | None = None) -> Iterator[Dialogue | BadRecord]:
    """Read files of any dialect in order, one result a record."""
    return _read(files, to_dialogue, reading)


def read_prompts(files: Sequence[Path], reading: Reading | None = None) -> Iterator[Dialogue | BadRecord]:
    """The same, where a dialogue may end with the question that is to be answered."""
    return _read(files, to_prompt, reading)


def read_documents(files: Sequence[Path], reading: Reading | None = None) -> Iterator[Document | BadRecord]:
    """Read the lines of .txt files and the records with `text` of the others, in order."""
    return _read(files, to_document, reading)


def read_pairs(files: Sequence[Path], reading: Reading | None = None) -> Iterator[Pair | BadRecord]:
    """Read preference pairs of any dialect in order, one result a record."""
    return _read(files, to_pair, reading)


def _read(
    files: Sequence[Path], make: Callable[[object, str, Reading], T], reading: Reading | None
) -> Iterator[T | BadRecord]:
    reading = reading or Reading()
    for path in files:
        for source, record in read_raw(path):
            try:
                if isinstance(record, Unusable):
                    raise record
                yield make(reading.without_ignored(record), source, reading)
            except Unusable as error:
                yield BadRecord(source, error.reason, error.detail)


def to_document(record: object, source: str, reading: Reading | None = None) -> Document:
    """Raises Unusable, as the three below."""
    reading = reading or Reading()
    record = _object(record, " with 'text'")
    text, plan = record.get("text"), sort_keys(tuple(record), ("text",))
    check_media(record, plan, reading, "the record")
    if is_empty(text) and (reply := lone_reply(record, reading)):
        return Document(reply, source)
    if "text" not in record:
        raise Unusable(
            "no text",
            f"has {quoted(record)}; pretraining reads 'text'{nearest(record, ('text',))} (dialogues are for "
            "supervised_finetuning.py; scripts/convert_to_pretrain_format.py makes documents of them)",
        )
    reading.note_keys(plan.unknown)
    text = text_of(text, "'text'")
    if not text:
        raise Unusable("empty text", "'text' is empty; write it or delete the record")
    _note_placeholder(text, source, reading)
    return Document(text, source)


def lone_reply(record: dict, reading: Reading) -> str:
    """The text of other tools' records for pretraining, which are dialogues of one reply to nothing."""
    try:
        present, plan = planned(record, prompt_plan, reading)
        turns = plan.dialect.read(present, reading)
    except Unusable:
        return ""
    turns = [turn for turn in turns if turn["role"] == "assistant" or turn["content"]]
    if [turn["role"] for turn in turns] != ["assistant"]:
        return ""
    check_media(present, plan.keys, reading, "the record")
    if key := check_reply_keys(present, plan.keys, reading, "the record"):
        raise _not_learned(present, key, reading)
    if "weight" in turns[0]:
        raise Unusable("not to be learned", "the only reply is marked so; delete the record or the mark")
    return turns[0]["content"]


def to_dialogue(record: object, source: str, reading: Reading | None = None) -> Dialogue:
    reading = reading or Reading()
    record, plan = planned(_object(record), dialogue_plan, reading)
    turns = _with_system(record, plan.dialect.read(record, reading))
    if not plan.is_plain:
        turns = _whole_prompt(turns, record, plan, reading)
        said = "\n".join(turn["content"] for turn in turns if turn["role"] == "assistant")
        if key := check_reply_keys(record, plan.keys, reading, "the record", said):
            raise _not_learned(record, key, reading)
    check_turns(turns)
    return Dialogue(turns, tools_of(record), _with_notes(source, turns, plan, reading))


def to_prompt(record: object, source: str, reading: Reading | None = None) -> Dialogue:
    """What is to be answered: a dialogue that may lack its last reply. What judges that reply does not matter."""
    reading = reading or Reading()
    record, plan = planned(_object(record), prompt_plan, reading)
    turns = _with_system(record, plan.dialect.read(record, reading))
    turns = _without_weights(turns)
    if not plan.is_plain:
        turns = _whole_prompt(turns, record, plan, reading)
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        turns = turns[:-1]
    check_turns(turns, needs_reply=False)
    return Dialogue(turns, tools_of(record), _with_notes(source, turns, plan, reading))


def to_pair(record: object, source: str, reading: Reading | None = None) -> Pair:
    reading = reading or Reading()
    record, plan = planned(_object(record), pair_plan, reading)
    turns, chosen, rejected = plan.dialect.read(record, reading)
    turns = _with_system(record, turns)
    if not plan.is_plain:
        turns = _whole_prompt(turns, record, plan, reading, (chosen, rejected))
        if key := check_reply_keys(record, plan.keys, reading, "the record"):
            raise _not_learned(record, key, reading)
    turns = _without_weights(turns)
    check_turns([*turns, {"role": "assistant", "content": chosen}])
    if not rejected:
        raise Unusable("empty reply", "the rejected reply is empty; write it or delete the record")
    if chosen == rejected:
        raise Unusable("same replies", "chosen and rejected are the same, so nothing is preferred; delete the record")
    source = _with_notes(source, turns, plan, reading)
    return Pair(turns, chosen, rejected, _margin(record), source, tools_of(record))


def turns_to_answer(messages: Sequence[dict]) -> list[dict]:
    """The messages of a conversation that ends with a question, as training reads them.

    Raises Unusable for content that is no text and for an order of turns that training never shows.
    """
    if messages and messages[-1]["role"] != "user":
        where = f"turn {len(messages)} ({messages[-1]['role']})"
        raise Unusable("no question", f"{where} is the last; end with the user's question")
    return to_prompt({"messages": list(messages)}, "", Reading(null_words=False)).messages


def _margin(record: dict) -> float | None:
    """By how much the chosen reply is better: `margin`, or the difference of the two scores."""
    if "margin" not in record and "score_chosen" not in record:
        return None
    values = [record.get(key) for key in ("margin", "score_chosen", "score_rejected")]
    if holds_nothing(values[0]) and any(map(holds_nothing, values[1:])):
        return None
    try:
        margin = float(values[0]) if not holds_nothing(values[0]) else float(values[1]) - float(values[2])
    except (TypeError, ValueError, OverflowError):
        raise Unusable("broken margin", f"margin or scores are {values!r:.80}; they must be numbers") from None
    if not 0 <= margin < float("inf"):
        raise Unusable("broken margin", f"the margin is {margin}; it is at least 0, or the replies are the wrong way")
    return margin


def _object(record: object, needs: str = "") -> dict:
    if not isinstance(record, dict):
        raise Unusable("not an object", f"the record is {kind_of(record)}; it must be an object{needs}")
    return record


def _whole_prompt(
    turns: list[dict], record: dict, plan: RecordPlan, reading: Reading, replies: Sequence[str] = ()
) -> list[dict]:
    """The turns with all that the record says of the question; Unusable where something of it cannot be kept."""
    check_other_forms(record, plan, [*(turn["content"] for turn in turns), *replies], reading)
    check_media(record, plan.keys, reading, "the record")
    return with_options(turns, record, plan, reading) if plan.keys.options else turns


def _without_weights(turns: list[dict]) -> list[dict]:
    """The turns of a prompt, of which nothing is learned."""
    return [
        {key: value for key, value in turn.items() if key != "weight"} if "weight" in turn else turn for turn in turns
    ]


def _not_learned(record: dict, key: str, reading: Reading) -> Unusable:
    return Unusable("not to be learned", f"{key!r} is {record[key]!r}; delete the record, or {reading.ignoring(key)}")


# What stands in a text for a picture, a film or a sound.
_PLACEHOLDER = re.compile(r"<\|?(?:image|img|video|audio|vision)(?:[_ ][^<>]{0,40})?\|?>", re.IGNORECASE)
_ONLY_URLS = re.compile(r"(?:<?(?:https?://|www\.)[!-~]+\s*)+", re.IGNORECASE)


def _with_notes(source: str, turns: list[dict], plan: RecordPlan, reading: Reading) -> str:
    """The source of a usable record, of which what is worth a line has been noted."""
    if plan.keys.unknown:
        reading.note_keys(plan.keys.unknown)
    for turn in turns:
        if "<" in turn["content"]:
            _note_placeholder(turn["content"], source, reading)
    return source


def _note_placeholder(text: str, source: str, reading: Reading) -> None:
    """Count what stands for more than text; it may also be what a text is about."""
    if mark := _PLACEHOLDER.search(text):
        reading.note(f"texts with {mark[0]}, of which only this word is learned", source)


def _with_system(record: dict, turns: list[dict]) -> list[dict]:
    """The turns, after the record's system prompt if it has one, given in `system` or as the first turn."""
    given = {}
    if "system" in record or "system_prompt" in record:
        given = {f"'{key}'": optional_text(record, key) for key in ("system", "system_prompt")}
    if turns and turns[0]["role"] == "system":
        given["turn 1"], *turns = turns[0]["content"], *turns[1:]
    if not given:
        return turns
    said = {text: where for where, text in given.items() if text}
    if len(said) > 1:
        raise Unusable("two system prompts", f"one in {' and one in '.join(said.values())}; keep one")
    return [*({"role": "system", "content": text} for text in said), *turns]


# A turn that calls tools is a kind of its own here: what it waits for is the tools' results.
_MAY_FOLLOW = {
    "start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "tool call": ("tool",),
    "tool": ("tool", "assistant"),
}


def check_turns(turns: list[dict], needs_reply: bool = True) -> None:
    """Refuse what no model should learn: turns out of order, empty turns, a last turn without reply."""
    if not turns:
        raise Unusable("empty conversation", "it has no turns; delete the record")
    before = "start"
    for number, turn in enumerate(turns, 1):
        role = turn["role"]
        if role not in _MAY_FOLLOW[before]:
            raise _out_of_order(number, role, before)
        before = "tool call" if turn.get("tool_calls") else role
        content = turn["content"]
        if before == "user" and not content:
            raise Unusable("empty user turn", f"turn {number} (user) is empty; write it or delete the record")
        if before == "assistant" and not content:
            raise Unusable("empty reply", f"turn {number} (assistant) is empty; write it or delete the record")
        if before == "assistant" and needs_reply and content[0] in "hHwW<" and _ONLY_URLS.fullmatch(content):
            raise Unusable("only a URL", f"turn {number} (assistant) is {content:.60}; write the reply itself")
    if "weight" in turns[-1] and all("weight" in turn for turn in turns if turn["role"] == "assistant"):
        raise Unusable("not to be learned", "every reply has the weight 0; delete the record")
    if needs_reply and before not in ("assistant", "tool call"):
        # Also after earlier replies: cutting the turn off would change the user's data silently.
        raise Unusable("no reply", f"turn {len(turns)} ({before}) is the last; add the reply or delete the turn")


def _out_of_order(number: int, role: str, before: str) -> Unusable:
    where = f"turn {number} ({role})"
    if role == "system":
        return Unusable("system not first", f"{where} must be turn 1")
    if role == before or (role == "assistant" and before == "tool call"):
        return Unusable("two turns in a row", f"turns {number - 1} and {number} are both from the {role}; join them")
    if role == "assistant":
        return Unusable("starts with the model", f"{where} comes before any question; start with the user")
    return Unusable(
        "turns out of order", f"{where} comes after: {before}; needed is: {' or '.join(_MAY_FOLLOW[before])}"
    )


OnBadData = Literal["error", "drop"]


def load_dialogues(
    files: Sequence[Path], on_bad_data: OnBadData | None = "error", reading: Reading | None = None
) -> tuple[list[Dialogue], Report]:
    """Read all dialogues of the files, and refuse bad records ("error") or drop and count them ("drop").

    None refuses them too, for a caller that has no such flag. Raises UserError, showing the first ten, on bad records
    unless they are dropped, and whenever nothing is left to use.
    """
    return _load(read_dialogues, files, on_bad_data, reading)


def load_prompts(
    files: Sequence[Path], on_bad_data: OnBadData | None = "error", reading: Reading | None = None
) -> tuple[list[Dialogue], Report]:
    """The same for dialogues that may lack their last reply."""
    return _load(read_prompts, files, on_bad_data, reading)


def load_pairs(
    files: Sequence[Path], on_bad_data: OnBadData | None = "error", reading: Reading | None = None
) -> tuple[list[Pair], Report]:
    """The same for the preference pairs of the files."""
    return _load(read_pairs, files, on_bad_data, reading)


def load_documents(
    files: Sequence[Path], on_bad_data: OnBadData | None = "error", reading: Reading | None = None
) -> tuple[list[Document], Report]:
    """The same for the documents of the files."""
    return _load(read_documents, files, on_bad_data, reading)


def _load(
    read: Callable[[Sequence[Path], Reading], Iterable[T | BadRecord]],
    files: Sequence[Path],
    on_bad_data: OnBadData | None,
    reading: Reading | None,
) -> tuple[list[T], Report]:
    reading = reading or Reading()
    records: list[T] = []
    report = Report()
    first_bad: list[str] = []
    for result in read(files, reading):
        report.read += 1
        if not isinstance(result, BadRecord):
            records.append(result)
        else:
            report.drop(result)
            if len(first_bad) < 10:
                first_bad.append(f"  {result}")
    report.notes = reading.lines()

    n_bad = report.dropped.total()
    if not report.read:
        raise UserError(f"no records in {_some(files)}")
    if not records or (n_bad and on_bad_data != "drop"):
        listed = "" if n_bad <= 10 else "; the first ten"
        hint = "no record can be used"
        if records:
            hint = "mend them" + (", or go on without them: --on_bad_data drop" if on_bad_data else "")
        raise UserError("\n".join([f"{n_bad} of {report.read} records are bad{listed}:", *first_bad, hint]))
    return records, report


# --------------------------------------------------------------------------------------------------
# Choosing records
# --------------------------------------------------------------------------------------------------


def are_same_files(train_path: str | None, eval_path: str | None, endings: Sequence[str] = RECORD_ENDINGS) -> bool:
    """Whether both flags name the same files, however they are spelled; UserError where only some are the same."""
    if train_path is None or eval_path is None:
        return True
    train_files, eval_files = (
        {file.resolve() for file in find_files(path, flag, endings)[0]}
        for path, flag in ((train_path, "--train_file_dir"), (eval_path, "--validation_file_dir"))
    )
    if train_files != eval_files and train_files & eval_files:
        raise UserError(
            f"--validation_file_dir {eval_path}: {min(train_files & eval_files)} is among the training files too; keep "
            "them apart, or name the same folder for both and a part is held out"
        )
    return train_files == eval_files


def choose_part(
    records: Sequence[T],
    part: Literal["train", "eval"],
    held_out: bool,
    max_train_samples: int | None,
    max_eval_samples: int | None,
    seed: int,
) -> list[T]:
    """The records of one part, drawn with the seed; held_out: both are parts of the same files."""
    if held_out:
        # As many as asked for, but never more than a tenth of the data.
        n_eval = max(1, min(max_eval_samples or len(records), len(records) // 10))
        train_part, eval_part = split_holdout(records, n_eval, seed, "--max_eval_samples")
        records = train_part if part == "train" else eval_part
    return take_samples(records, max_train_samples if part == "train" else max_eval_samples, seed)


def load_part(
    part: Literal["train", "eval"],
    *,
    kind: str,
    data_args: "DataArguments",
    do_eval: bool,
    read: Callable[..., tuple["Dataset", Report, Report, bool]],
    describe: Callable[["Dataset"], str],
    endings: Sequence[str] = RECORD_ENDINGS,
) -> tuple["Dataset", dict[str, str]]:
    """What a stage trains or is evaluated on, and the facts to log.

    Args:
        kind: what the records are: "dialogues", "pairs", "documents", "prompts".
        read: `cached_dialogues` or another of tokenization.py, given all but the files and what data_args says.
        describe: the tokens of the rows, in words.

    Raises:
        UserError: a flag is missing, or no record is left.
    """
    flag, path = (
        ("--train_file_dir", data_args.train_file_dir)
        if part == "train"
        else ("--validation_file_dir", data_args.validation_file_dir or data_args.train_file_dir)
    )
    if path is None:
        raise UserError(f"{flag} is missing: name the file or folder of the {kind}")
    held_out = do_eval and are_same_files(data_args.train_file_dir, data_args.validation_file_dir, endings)
    files, unread = find_files(path, flag, endings)
    dataset, read_report, report, was_cached = read(
        part,
        files,
        held_out=held_out,
        max_train_samples=data_args.max_train_samples,
        max_eval_samples=data_args.max_eval_samples,
        num_workers=data_args.preprocessing_num_workers,
        on_bad_data=data_args.on_bad_data,
        ignore_keys=split_keys(data_args.ignore_keys),
        overwrite=data_args.overwrite_cache,
    )
    if len(dataset) == 0:
        examples = "; ".join(line for lines in report.examples.values() for line in lines)
        raise UserError(f"{flag} {path}: {report.summary()}, so nothing is left: {examples}")
    for note in [*read_report.notes, *report.notes]:
        logger.info(f"{part}: {note}")
    for reason, lines in report.examples.items():
        logger.info(f"{part}: left out as {reason}: {'; '.join(lines)}{' ...' if len(lines) == 3 else ''}")
    return dataset, {
        f"{part} files": f"{len(files)} in {path}" + (f", {len(unread)} with other endings not read" if unread else ""),
        f"{part} records": read_report.summary(),
        f"{part} {kind}": report.summary()
        + (", held out of the training files by the seed" if held_out and part == "eval" else ""),
        f"{part} tokens": describe(dataset) + (", from the cache" if was_cached else ""),
    }


def take_samples(items: Sequence[T], max_samples: int | None, seed: int) -> list[T]:
    """A seeded random choice of at most `max_samples` items, in their order; None or too few takes all."""
    if max_samples is None or max_samples >= len(items):
        return list(items)
    chosen = random.Random(seed).sample(range(len(items)), max_samples)
    return [items[index] for index in sorted(chosen)]


def split_holdout(records: Sequence[T], size: int | float, seed: int, flag: str) -> tuple[list[T], list[T]]:
    """Split into (train, held out), both in the order given; a question or text never falls on both sides.

    Args:
        records: what to split.
        size: how many to hold out (int), or which share of all (float below 1). Fewer are held out where the
            records that share a question do not fit.
        seed: decides which questions come first; the order of the records does not matter.
        flag: the flag that set `size`, for the message.

    Raises:
        UserError: a side would be empty.
    """
    by_question: dict[str, list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        by_question[_question_key(record)].append(index)

    wanted = size if isinstance(size, int) else max(1, round(size * len(records)))
    held_out: set[int] = set()
    for question in sorted(by_question, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest()):
        if len(held_out) + len(by_question[question]) <= wanted:
            held_out.update(by_question[question])

    if not held_out or len(held_out) == len(records):
        raise UserError(
            f"{flag} {size}: cannot hold out {wanted} of {len(records)} records "
            f"({len(by_question)} of them different) and train on the rest; "
            "lower it or give validation files of their own"
        )
    train = [record for index, record in enumerate(records) if index not in held_out]
    return train, [records[index] for index in sorted(held_out)]


def _question_key(record: Dialogue | Document | Pair) -> str:
    """The first user turn, or the text, without what copies differ in: case, character width, punctuation, spaces."""
    if isinstance(record, Document):
        question = record.text
    else:
        question = next(message["content"] for message in record.messages if message["role"] == "user")
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", question).casefold())


# --------------------------------------------------------------------------------------------------
# The cache of prepared data
# --------------------------------------------------------------------------------------------------


def cached_part(
    part: Literal["train", "eval"],
    files: Sequence[Path],
    load: Callable[[Sequence[Path], OnBadData, Reading], tuple[list[T], Report]],
    tokenize: Callable[..., tuple["Dataset", Report]],
    settings: dict,
    cache_dir: str | Path,
    *,
    held_out: bool,
    max_train_samples: int | None,
    max_eval_samples: int | None,
    seed: int,
    num_workers: int = 1,
    on_bad_data: OnBadData = "error",
    ignore_keys: Sequence[str] = (),
    overwrite: bool = False,
) -> tuple["Dataset", Report, Report, bool]:
    """The tokenized records of one part of the files, from the cache where nothing has changed.

    Args:
        load: `load_dialogues`, `load_pairs` or `load_documents`.
        tokenize: makes the rows and a report of the chosen records, given num_workers and on_bad_data.
        settings: what decides the rows besides files and choice: the kind of rows, tokenizer, limits.

    Returns:
        The rows; the reports of reading and of tokenizing; whether they were in the cache.
    """
    choice = {"max_train_samples": max_train_samples, "max_eval_samples": max_eval_samples, "seed": seed}
    if not held_out:  # then nothing depends on how the other part is chosen
        choice |= {"max_eval_samples" if part == "train" else "max_train_samples": None}
        choice |= {"seed": None} if not any(choice[name] for name in ("max_train_samples", "max_eval_samples")) else {}

    def build() -> tuple["Dataset", dict]:
        records, read_report = load(files, on_bad_data, Reading(tuple(ignore_keys)))
        chosen = choose_part(records, part, held_out, **choice)
        dataset, report = tokenize(chosen, num_workers=num_workers, on_bad_data=on_bad_data)
        return dataset, {"read": read_report.as_dict(), "tokenized": report.as_dict()}

    key = settings | choice | {
        "part": part,
        "files": content_fingerprint(files),
        "held_out": held_out,
        "on_bad_data": on_bad_data,
        "ignore_keys": list(ignore_keys),
    }  # fmt: skip
    dataset, reports, was_cached = cached_dataset(cache_dir, key, build, overwrite)
    return dataset, Report.from_dict(reports["read"]), Report.from_dict(reports["tokenized"]), was_cached


def cached_dataset(
    cache_dir: str | Path,
    key_parts: dict,
    build: Callable[[], tuple["Dataset", dict]],
    overwrite: bool = False,
) -> tuple["Dataset", dict, bool]:
    """Load what `build` once made for these key parts, or build and save it.

    Each process of a launch calls this: the first to get the file lock builds, the others wait and load. No
    process group takes part, so a long tokenization cannot run into its time-out, and a process that dies
    frees the lock.

    Args:
        cache_dir: the folder of all caches, shared by every stage.
        key_parts: all that decides the result, as JSON values: data fingerprint, tokenizer, template, limits.
        build: returns the dataset and a report as JSON values.
        overwrite: build again, once a launch.

    Returns:
        The dataset, memory-mapped from the cache; the report; whether it was found rather than built.
    """
    key = hashlib.sha256(json.dumps(key_parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    folder = Path(cache_dir, key[:32])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        found = _load_cache(folder)
        if found and overwrite:
            # Under a launcher, a cache finished after this process started is a sibling's rebuild. A process
            # that starts later than that builds once more, which costs time and does no harm.
            *_, built_at = found
            by_sibling = "LOCAL_RANK" in os.environ and built_at > _IMPORTED_AT
            found = found if by_sibling else None
        was_cached = found is not None
        if not was_cached:
            _save_cache(folder, *build())
            found = _load_cache(folder)
            assert found is not None, f"{folder} was just written and does not load"
    dataset, report, _ = found
    return dataset, report, was_cached


_MANIFEST = "manifest.json"


def _save_cache(folder: Path, dataset: "Dataset", report: dict) -> None:
    """Write under another name and rename when whole: a killed run leaves no folder that looks finished."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    # By itself datasets 5.2 writes no file for an empty dataset, and then cannot load it.
    dataset.save_to_disk(partial, num_shards=None if len(dataset) else 1)
    manifest = {"report": report, "sizes": _sizes(partial), "built_at": time.time()}
    Path(partial, _MANIFEST).write_text(json.dumps(manifest, ensure_ascii=False), encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    partial.replace(folder)


def _load_cache(folder: Path) -> tuple["Dataset", dict, float] | None:
    """The dataset, its report and when it was built; None unless each file has the size it was written in."""
    from datasets import load_from_disk

    try:
        manifest = json.loads(Path(folder, _MANIFEST).read_text(encoding="utf-8"))
        # Others may come beside them: `datasets` keeps there what a stage maps a loaded dataset to, as packing does.
        if not manifest["sizes"].items() <= _sizes(folder).items():
            return None
        return load_from_disk(folder), manifest["report"], manifest["built_at"]
    except (FileNotFoundError, ValueError, KeyError):
        return None


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file of a cache but the manifest."""
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.name != _MANIFEST}
