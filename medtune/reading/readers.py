"""Read all records of some files; bad ones are refused with `file:line`, or dropped and counted."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Literal

from medtune.errors import Unusable, UserError
from medtune.reading.conversations import to_document, to_feedback, to_pair, to_prompt, to_question, to_taught
from medtune.reading.exams import with_answer_letters
from medtune.reading.files import read_raw
from medtune.reading.finding import RecordFile, some_names
from medtune.reading.keys import Reading
from medtune.reading.records import BadDataError, BadRecord, Report, T


def _read(
    make: Callable[[object, str, Reading], T],
    files: Sequence[RecordFile],
    reading: Reading | None = None,
    rows: Callable[[RecordFile], Iterable[tuple[str, object]]] = read_raw,
) -> Iterator[T | BadRecord]:
    """Read files of any dialect in order, one result a record."""
    reading = reading or Reading()
    for path in files:
        for source, record in rows(path):
            try:
                if isinstance(record, Unusable):
                    raise record
                yield make(reading.without_ignored(record), source, reading)
            except Unusable as error:
                yield BadRecord(source, error.reason, error.detail)


def _lettered(path: RecordFile) -> Iterator[tuple[str, object]]:
    return with_answer_letters(read_raw(path), partial(read_raw, path))


read_dialogues = partial(_read, to_taught, rows=_lettered)
read_prompts = partial(_read, to_prompt)  # dialogues that may end with the question that is to be answered
read_questions = partial(_read, to_question, rows=_lettered)  # the same for reinforcement learning, exams too
read_documents = partial(_read, to_document)  # lines of .txt files, and records with `text`
read_pairs = partial(_read, to_pair)
read_feedback = partial(_read, to_feedback)  # dialogues whose last reply is marked as good or bad

OnBadData = Literal["error", "drop"]


def read_all(
    read_records: Callable[[Sequence[RecordFile], Reading], Iterable[T | BadRecord]],
    files: Sequence[RecordFile],
    reading: Reading,
) -> tuple[list[T], Report]:
    """The records that can be used, and what the others are. Raises UserError where none can be."""
    records: list[T] = []
    report = Report()
    for result in read_records(files, reading):
        report.read += 1
        if not isinstance(result, BadRecord):
            records.append(result)
        else:
            report.drop(result)
    report.notes = reading.lines()
    if not report.read:
        raise UserError(f"no records in {some_names(files)}")
    if not records:
        raise BadDataError([report.refusal("records", report.dropped)], "no record can be used")
    return records, report


def load_records(
    read_records: Callable[[Sequence[RecordFile], Reading], Iterable[T | BadRecord]],
    files: Sequence[RecordFile],
    on_bad_data: OnBadData | None = "error",
    reading: Reading | None = None,
) -> tuple[list[T], Report]:
    """Read all records with `read_dialogues` or another reader; bad ones are refused, or dropped and counted.

    on_bad_data: "error" refuses them, "drop" counts them; None refuses them too, for a caller that has no such flag.
    Raises UserError, with the first ten faults, on bad records unless they are dropped, and whenever nothing is left.
    """
    records, report = read_all(read_records, files, reading or Reading())
    if report.faults_by_reason and on_bad_data != "drop":
        refusals = [report.refusal("records", report.faults_by_reason)]
        raise BadDataError(refusals) if on_bad_data else BadDataError(refusals, "fix them")
    return records, report


load_dialogues = partial(load_records, read_dialogues)
load_prompts = partial(load_records, read_prompts)
load_documents = partial(load_records, read_documents)
