"""Record files of any kind: each reader yields (source, record), or (source, Unusable) where a record is broken.

A fault after which the rest of a file cannot be read is a `UserError` always: nobody could count what was lost.
"""

import csv
import gzip
import itertools
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from medtune.errors import Unusable, UserError
from medtune.reading.byte_faults import line_fault, readable_rows, utf8_fault
from medtune.reading.finding import TEXT_ENDINGS, RecordFile, display_path, ending_of
from medtune.reading.hub_data import HubSplit
from medtune.reading.json_files import read_json
from medtune.reading.magic_bytes import BLOCK, is_text, misnamed, read_start, utf16_without_mark

if TYPE_CHECKING:
    import pyarrow


def read_raw(path: RecordFile, encoding: str = "utf-8-sig") -> Iterator[tuple[str, object]]:
    """Read the records of one file as they are: (source, record), or (source, Unusable) for a broken one.

    Never holds more than about a megabyte or the longest record. Raises UserError where the rest is unreadable.
    """
    name = display_path(path)
    if isinstance(path, HubSplit):
        yield from path.records()
    elif path.is_file() and not path.stat().st_size:
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
    name, ending = display_path(path), ending_of(path)
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
    """Whether `\\r` alone ends the lines, as on old Macs, even if cells contain `\\n`."""
    if b"\r" not in start:
        return False
    text = start.decode(encoding, errors="replace")
    if ending in (".csv", ".tsv") and re.match(r"[^\r\n]+\r(?![\r\n])", text):
        return True
    return text.count("\r") - text.count("\r\n") > text.count("\n")


def _other_text(text: str, ending: str) -> str:
    """If a text is not what the file's ending says: what it is and what to do. "" otherwise."""
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
    """The separator of the cells: the one that gives most known column names, or the only one that splits."""
    header = re.sub(r'"[^"]*"', lambda cell: '""' if set(cell[0]) & set(_SEPARATORS) else cell[0], header)
    n_known = {mark: len(_COLUMN_NAMES.intersection(_header_names(header, mark))) for mark in _SEPARATORS}
    best = max(_SEPARATORS, key=n_known.get)
    if n_known[best] or "," in header:
        return best
    return next((mark for mark in _SEPARATORS if mark in header and mark in row), ",")


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
    raw_lines: list[str] = []
    # strict: otherwise a quote that is never closed silently takes the rest of the file into one cell.
    rows = csv.reader(_noted(lines, raw_lines), strict=True, delimiter=separator)
    start = n_before
    try:
        header = next(rows, [])
        if fault := utf8_fault("".join(raw_lines)):
            raise UserError(f"{name}:1: {fault.reason}: {fault.detail}")
        _refuse_twice([column for column in header if column], f"{name}:1")
        columns = _lowered(header)
        names = {form for name in _COLUMN_NAMES.union(columns) for form in (name, name.capitalize(), name.upper())}
        start += rows.line_num
        raw_lines.clear()
        for cells in rows:
            text = "".join(raw_lines)
            source, fault = f"{name}:{start + 1}", line_fault(text, start + 1)
            start = n_before + rows.line_num
            raw_lines.clear()
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
    """Whether these cells are a header: this table's column names in any order, or another table's."""
    if sorted(cells) == sorted(columns):
        return True
    return _COLUMN_NAMES.issuperset(cells) and any(names <= set(cells) for names in _TABLES)


def _noted(lines: Iterable[str], raw_lines: list[str]) -> Iterator[str]:
    """Yield the lines without byte order marks, and append each one as it was to `raw_lines`."""
    for line in lines:
        raw_lines.append(line)
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
            _refuse_fields_twice(file.schema_arrow, name)
            for batch in file.iter_batches(batch_size=1000):
                for record in readable_rows(batch):
                    number += 1
                    yield f"{name}:row {number}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{name}: not a whole parquet file ({error}); copy or download it again") from None


def _refuse_fields_twice(fields: Iterable["pyarrow.Field"], name: str) -> None:
    """Of two columns, or two fields of a struct, with one name pyarrow would keep one."""
    fields = list(fields)
    _refuse_twice([field.name for field in fields], name)
    for field in fields:
        _refuse_fields_twice(map(field.type.field, range(field.type.num_fields)), name)


def _refuse_twice(columns: list[str], where: str) -> None:
    if twice := next((column for column in columns if columns.count(column) > 1), None):
        raise UserError(f"{where}: two columns are called {twice!r}; rename one or take it out")


def _read_text(file: TextIO, name: str) -> Iterator[tuple[str, object]]:
    """Yield each line that is not blank as a record with `text`."""
    for number, line in enumerate(file, 1):
        if line[0] in "\ufeffv":  # the mark or the pointer of a file that was joined to another
            line = line.lstrip("\ufeff")
            if line.startswith("version https://git-lfs.github.com/spec/v"):
                raise UserError(f"{name}:{number}: {misnamed(line.encode())}")
        if line.strip():
            yield f"{name}:{number}", line_fault(line, number) or {"text": line}


_TEXT_READERS = {
    ".jsonl": read_json,
    ".json": read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".txt": _read_text,
}
