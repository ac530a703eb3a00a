"""Read all records of some files; bad ones are refused with `file:line`, or dropped and counted.

dialogues, report = load_dialogues(files, on_bad_data="error")
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from medtune.errors import Unusable, UserError
from medtune.reading.conversations import to_dialogue, to_document, to_feedback, to_pair, to_prompt
from medtune.reading.files import read_raw
from medtune.reading.finding import some_names
from medtune.reading.keys import Reading
from medtune.reading.records import BadRecord, Dialogue, Document, Feedback, Pair, Report, T


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


def read_feedback(files: Sequence[Path], reading: Reading | None = None) -> Iterator[Feedback | BadRecord]:
    """Read dialogues of any dialect whose last reply is marked as good or bad, one result a record."""
    return _read(files, to_feedback, reading)


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


OnBadData = Literal["error", "drop"]


def load_records(
    read_records: Callable[[Sequence[Path], Reading], Iterable[T | BadRecord]],
    files: Sequence[Path],
    on_bad_data: OnBadData | None = "error",
    reading: Reading | None = None,
) -> tuple[list[T], Report]:
    """Read all records with `read_dialogues` or another reader; bad ones are refused, or dropped and counted.

    on_bad_data: "error" refuses them, "drop" counts them; None refuses them too, for a caller that has no such flag.
    Raises UserError, showing the first ten, on bad records unless they are dropped, and whenever nothing is left.
    """
    reading = reading or Reading()
    records: list[T] = []
    report = Report()
    first_bad: list[str] = []
    for result in read_records(files, reading):
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
        raise UserError(f"no records in {some_names(files)}")
    if not records or (n_bad and on_bad_data != "drop"):
        listed = "" if n_bad <= 10 else "; the first ten"
        hint = "no record can be used"
        if records:
            hint = "fix them" + (", or go on without them: --on_bad_data drop" if on_bad_data else "")
        raise UserError("\n".join([f"{n_bad} of {report.read} records are bad{listed}:", *first_bad, hint]))
    return records, report


load_dialogues = partial(load_records, read_dialogues)
load_prompts = partial(load_records, read_prompts)
load_pairs = partial(load_records, read_pairs)
load_documents = partial(load_records, read_documents)
