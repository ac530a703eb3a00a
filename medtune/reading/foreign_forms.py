"""Read published data sets: other encodings and other columns, recognized by name or named by flags.

The other modules of this room read what a stage may be given; this is for the tools that make it from something else.
"""

import argparse
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from medtune.errors import Unusable, UserError
from medtune.reading.charsets import UTF8, detect_encoding, known_encoding
from medtune.reading.conversations import to_dialogue, to_pair
from medtune.reading.dialects import (
    ANSWERS,
    ASIDE,
    KEYS_READ,
    QUESTIONS,
    SCORES,
    has_dialect,
    is_read_whole,
    lacks_prompt,
)
from medtune.reading.exams import ExamFormat, as_taught, with_answer_letters
from medtune.reading.files import csv_separator, read_raw
from medtune.reading.finding import RecordFile, ending_of
from medtune.reading.keys import Reading, sort_keys, split_keys
from medtune.reading.records import BadRecord, Dialogue, Pair
from medtune.reading.thinking import THOUGHT_FORMS
from medtune.reading.turns import SPEAKER
from medtune.reading.values import is_empty, parse_nested, text_of, with_values


@dataclass(frozen=True)
class _Form:
    """A form of published records: its columns in lower case, and the function that converts a record."""

    columns: tuple[str, ...]
    convert: Callable[[dict], dict]
    names: Mapping[str, str] = field(default_factory=dict)  # for each name of ours the file's


def _from_title_and_ask(record: dict) -> dict:
    """The title is the question in short; the long one often repeats it."""
    title, ask = (str(record.pop(key, None) or "").strip() for key in ("title", "ask"))
    return {**record, "question": ask if title in ask else title if ask in title else f"{title}\n{ask}"}


def _from_spoken_list(key: str, record: dict) -> dict:
    """A list of turns, or of strings that start with the speaker. Without speakers, the two alternate."""
    value = record.pop(key)
    turns = _list_in_cell(value)
    if not (turns and isinstance(turns, list) and all(isinstance(turn, str) for turn in turns)):
        return {**record, "conversations": value}
    spoken = [SPEAKER.match(turn.lstrip()) for turn in turns]
    if not any(spoken):
        roles = ("user", "assistant")
        return {**record, "messages": [{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)]}
    if not all(spoken):
        silent = spoken.index(None)
        raise Unusable("unknown speaker", f"turn {silent + 1} of {key!r} starts with {turns[silent]!r:.20}")
    return {**record, "messages": [{"role": match[1], "content": match.string[match.end() :]} for match in spoken]}


_CHOSEN = ("response_chosen", "chosen", "good_answer", "chosen_response", "preferred", "better")

_REJECTED = ("response_rejected", "rejected", "bad_answer", "rejected_response", "dispreferred", "worse")


def _renamed(names: dict[str, str], record: dict) -> dict:
    """Rename the record's keys, and take the first of several wordings (`questions`)."""
    renamed = {}
    for key, value in record.items():
        if key in ("questions", "answers") and isinstance(value, list):
            value = next((text for text in value if not is_empty(text)), "")
        renamed[names.get(key, key)] = value
    return renamed


def _dialogue_form(keys: Sequence[str]) -> _Form | None:
    """The form of dialogues with these keys: Toyhom's, HuatuoGPT-o1's, HuatuoGPT's, MedDialog's, DISC-Med-SFT's ..."""
    if "ask" in keys and "answer" in keys:
        return _Form(tuple(key for key in ("title", "ask", "answer") if key in keys), _from_title_and_ask)
    if {"question", "complex_cot", "response"} <= set(keys):
        return _Form(("question", "complex_cot", "response"), functools.partial(_renamed, {"response": "answer"}))
    alpaca = {"instruction": ("instruction", "指令"), "input": ("input", "输入")}
    for prompt_meanings in ({"question": QUESTIONS}, alpaca):
        if form := _renaming_form(
            keys, prompt_meanings | {"answer" if "question" in prompt_meanings else "output": ANSWERS}
        ):
            return form
    lists = [key for key in keys if key in _TURNS]
    if len(lists) != 1:
        return None
    return _Form((lists[0],), functools.partial(_from_spoken_list, lists[0]), {"conversations": lists[0]})


def _pair_form(keys: Sequence[str]) -> _Form | None:
    meanings = {"question": QUESTIONS, "response_chosen": _CHOSEN, "response_rejected": _REJECTED}
    # A question and its answer may have only the rejected one beside them.
    return _renaming_form(keys, meanings) or _renaming_form(keys, meanings | {"response_chosen": ANSWERS})


@functools.lru_cache(maxsize=4000)
def _form_of(keys: tuple[str, ...], kind: Literal["dialogues", "pairs"]) -> _Form | None:
    """The form of records with these keys; None if dialects.py reads them, or if they are unknown."""
    find = _dialogue_form if kind == "dialogues" else _pair_form
    if has_dialect(keys, kind):
        return find(keys) if lacks_prompt(keys) else None
    lower = tuple(dict.fromkeys(key.strip().lower() for key in keys))
    if lower != keys and has_dialect(lower, kind):
        return _Form(keys, lambda lowered: lowered)
    return find(lower)


def _renaming_form(keys: Sequence[str], meanings_by_name: dict[str, Sequence[str]]) -> _Form | None:
    """The form that renames one key for each meaning; None if a meaning has no key, or several."""
    keys_by_name = {name: [key for key in keys if key in meanings] for name, meanings in meanings_by_name.items()}
    if any(len(meant) != 1 for meant in keys_by_name.values()):
        return None
    names = {meant[0]: name for name, meant in keys_by_name.items()}
    own_names = {name: key for key, name in names.items()}
    return _Form(tuple(names), functools.partial(_renamed, names), own_names)


_COLUMNS = {*QUESTIONS, *ANSWERS, *_CHOSEN, *_REJECTED}
_TURNS = ("data", "utterances", "conversation", "dialogue", "dialog", "dialogs", "turns", "items", "chat")
_READ = {*_COLUMNS, *_TURNS, *KEYS_READ, "title", "ask", "complex_cot"}
_READ_KEYS = tuple(sorted(_READ))


def _list_in_cell(value: object) -> object:
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(Unusable):  # words in brackets
            return parse_nested(value, "")
    return value


def rows_of(record: object) -> list[dict] | None:
    """The rows of a record that holds whole columns (lists, or pandas' `{"0": ...}`); None for any other."""
    if not isinstance(record, dict) or len(record) < 2:
        return None
    if "questions" in record and "answers" in record:
        record = record | {key: _list_in_cell(record[key]) for key in ("questions", "answers")}
    kinds = set(map(type, record.values()))
    if list not in kinds and dict not in kinds:
        return None
    columns = {}
    for key, value in record.items():
        if isinstance(value, dict) and value and all(number.isdigit() for number in value):
            value = list(value.values())
        if isinstance(value, list):
            columns[key] = value
    named = [column for key, column in columns.items() if key.strip().lower() in _COLUMNS]
    lengths = {len(column) for column in columns.values()}
    is_text = all(isinstance(text, str | None | list) for column in named for text in column)
    wordings = [text for column in named for text in column if isinstance(text, list)]
    is_turns = any(isinstance(part, dict) for text in wordings for part in text)
    if len(named) < 2 or len(lengths) != 1 or not is_text or is_turns:
        return None
    rest = {key: value for key, value in record.items() if key not in columns}
    return [{**rest, **dict(zip(columns, row, strict=True))} for row in zip(*columns.values(), strict=True)]


@dataclass(frozen=True)
class Columns:
    """Columns named by flags, "" for none; several `question` columns are joined by line breaks."""

    question: tuple[str, ...] = ()
    answer: str = ""
    chosen: str = ""
    rejected: str = ""
    system: str = ""
    history: str = ""

    @property
    def names(self) -> dict[str, str]:
        """For each name of ours the file's."""
        names = {"question": " + ".join(self.question), "answer": self.answer, "system": self.system}
        names |= {"response_chosen": self.chosen, "response_rejected": self.rejected, "history": self.history}
        return {ours: theirs for ours, theirs in names.items() if theirs}


def add_reading_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `reader_of`."""
    parser.add_argument("--encoding", type=known_encoding, help="of text files; by default UTF-8, GB18030 or UTF-16")
    parser.add_argument(
        "--reasoning", choices=tuple(THOUGHT_FORMS), default="leave_out",
        help="what becomes of thoughts in a key of their own, such as reasoning_content or HuatuoGPT-o1's Complex_CoT: "
        "left out, or in front of the reply in <think> tags or under that model's headings",
    )  # fmt: skip
    add_ignore_keys(parser)
    parser.add_argument(
        "--role_map", type=known_roles, default={}, metavar="NAME=ROLE,...",
        help="who speaks in turns with names of their own: 家属=user,药师=assistant",
    )  # fmt: skip
    group = parser.add_argument_group("columns, where they are not found by their names")
    group.add_argument("--question_column", nargs="+", default=[], metavar="NAME", help="several are joined")
    for name in ("answer", "chosen", "rejected", "system", "history"):
        group.add_argument(f"--{name}_column", default="", metavar="NAME")


def add_ignore_keys(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--ignore_keys", type=split_keys, default=(), metavar="KEYS",
        help="keys of records and turns to read as if they were absent, with commas: label,images",
    )  # fmt: skip


def reader_of(
    args: argparse.Namespace, kind: Literal["dialogues", "pairs"], exam_format: ExamFormat | None = None
) -> "ForeignReader":
    """The reader for these flags; raises UserError if some of the needed columns are not named."""
    names = {name: getattr(args, f"{name}_column") for name in ("answer", "chosen", "rejected", "system", "history")}
    columns = Columns(tuple(args.question_column), **names)
    needed = ("question", "answer") if kind == "dialogues" else ("question", "chosen", "rejected")
    lacking = [f"--{name}_column" for name in needed if not getattr(columns, name)]
    if columns != Columns() and lacking:
        raise UserError(f"{' and '.join(lacking)}: name these too; with one column named, none is found by itself")
    reading = Reading(args.ignore_keys, args.role_map, thoughts=args.reasoning)
    return ForeignReader(kind, columns, args.encoding, reading, exam_format)


def known_roles(listed: str) -> dict[str, str]:
    """For argparse: `患者=user,医生=assistant`."""
    pairs = [pair.partition("=") for pair in listed.split(",") if pair.strip()]
    roles = {name.strip(): role.strip() for name, _, role in pairs}
    if unknown := [role for role in roles.values() if role not in ("system", "user", "assistant", "tool")]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no role; give NAME=user, assistant, system or tool")
    return roles


def _by_own_names(fault: Unusable, names: Mapping[str, str]) -> Unusable:
    """The fault by the names of the file's columns, and not by what they are read as."""
    detail = re.sub(r"'(\w+)'", lambda name: f"'{names.get(name[1], name[1])}'", fault.detail)
    return Unusable(fault.reason, detail)


class ForeignReader:
    """Reads dialogues or pairs of any known form, record by record, and notes the forms and encodings.

    exam_format: how exam questions are asked in dialogues; None reads them as questions like any other.
    """

    def __init__(
        self,
        kind: Literal["dialogues", "pairs"],
        columns: Columns = Columns(),
        encoding: str | None = None,
        reading: Reading | None = None,
        exam_format: ExamFormat | None = None,
    ):
        self.reading = reading or Reading()
        self._kind = kind
        self._make = to_dialogue if kind == "dialogues" else to_pair
        self._columns = columns
        self._has_columns = columns != Columns()
        self._encoding = encoding
        self._exam_format = exam_format
        self._n_exams = 0
        self._n_by_columns: Counter[tuple[str, ...]] = Counter()
        self._encodings: dict[RecordFile, str] = {}
        self._separators: dict[RecordFile, str] = {}

    def read(self, files: Sequence[RecordFile]) -> Iterator[Dialogue | Pair | BadRecord]:
        """One result a record, in order."""
        for path in files:
            for source, record in with_answer_letters(self.read_raw(path), functools.partial(self.read_raw, path)):
                try:
                    yield self.convert(record, source)
                except Unusable as error:
                    yield BadRecord(source, error.reason, error.detail)

    def read_raw(self, path: RecordFile) -> Iterator[tuple[str, object]]:
        """The raw records of a file, in the given or detected encoding; whole columns are split into rows."""
        encoding = self.encoding_of(path)
        if ending_of(path) in (".csv", ".tsv") and (separator := csv_separator(path, encoding)) != ",":
            self._separators[path] = separator
        for source, record in read_raw(path, encoding):
            if isinstance(record, Unusable) and record.reason == "not UTF-8":
                reason = record.reason if encoding == UTF8 else f"not {encoding}"
                record = Unusable(reason, "a byte has no meaning there; fix it, or name the file's --encoding")
            rows = rows_of(record)
            if rows is None:
                yield source, record
            else:
                yield from ((f"{source} (row {number})", row) for number, row in enumerate(rows, 1))

    def encoding_of(self, path: RecordFile) -> str:
        """The given or detected encoding, noted if it is not UTF-8."""
        encoding = self._encoding or (UTF8 if ending_of(path) == ".parquet" else detect_encoding(path))
        if encoding != UTF8:
            self._encodings[path] = encoding
        return encoding

    def convert(self, record: object, source: str) -> Dialogue | Pair:
        """Raises Unusable."""
        if isinstance(record, Unusable):
            raise record
        if self._has_columns:
            try:
                named = self._by_columns(record)
                return self._from_exam(named, source) or self._make(named, source, self.reading)
            except Unusable as fault:
                raise _by_own_names(fault, self._columns.names) from None
        if not isinstance(record, dict):
            return self._make(record, source, self.reading)
        record = self.reading.without_ignored(record)
        if dialogue := self._from_exam(record, source):
            return dialogue
        present = with_values(record)
        keys = tuple(present)
        if is_read_whole(keys, self._kind):
            return self._make(present, source, self.reading)
        form = _form_of(keys, self._kind) or _form_of(tuple(record), self._kind)
        if form is None:
            return self._make(record, source, self.reading)
        try:
            item = self._make(form.convert(self._lowered(record)), source, self.reading)
        except Unusable as fault:
            raise _by_own_names(fault, form.names) from None
        self._n_by_columns[form.columns] += 1
        return item

    def _from_exam(self, record: dict, source: str) -> Dialogue | None:
        """The dialogue of an exam question and its answer; None for any other record."""
        exam = as_taught(record, self._exam_format) if self._exam_format else None
        if exam is None:
            return None
        dialogue = to_dialogue(exam, source, self.reading)
        self._n_exams += 1
        return dialogue

    def _lowered(self, record: dict) -> dict:
        """The record with the known names in lower case; unknown names stay, for messages."""
        lowered = {}
        for key, value in record.items():
            name = key.strip().lower()
            name = name if name in _READ else key
            if is_empty(lowered.get(name)):
                lowered[name] = value
            elif not is_empty(value) and value != lowered[name]:
                raise Unusable("two forms", f"has {name!r} twice, with other words; {self.reading.ignoring(key)}")
        return lowered

    def _by_columns(self, record: object) -> dict:
        if not isinstance(record, dict):
            raise Unusable("not an object", f"the record is {record!r:.60}; it has no columns")
        columns = self._columns
        named = {
            "answer": columns.answer, "response_chosen": columns.chosen, "response_rejected": columns.rejected,
            "system": columns.system, "history": columns.history,
        }  # fmt: skip
        absent = [name for name in (*columns.question, *filter(None, named.values())) if name not in record]
        if absent:
            raise Unusable("no such column", f"has {_listed(record)}; the flags name {_listed(absent)}")
        used = {*columns.question, *named.values(), *(("system_prompt",) if columns.system else ())}
        values = {key: record[name] for key, name in named.items() if name}
        question = record[columns.question[0]]
        if len(columns.question) > 1:
            by_column = {name: record[name] for name in columns.question if not is_empty(record[name])}
            texts = (text if isinstance(text, int | float) else text_of(text, name) for name, text in by_column.items())
            question = "\n".join(map(str, texts))
        record = self.reading.without_ignored(record)
        beside = tuple(key for key in record if key not in used and not is_empty(record[key]))
        plan = sort_keys(beside, _READ_KEYS)
        kept_keys = [key for key in ("history", *ASIDE, *SCORES) if key in beside]
        kept_keys += plan.that_matter + plan.unknown
        return {key: record[key] for key in kept_keys} | {"question": question} | values

    def describe(self) -> list[str]:
        """One line for each foreign form, encoding and separator, and for each note on the records."""
        lines = [
            f"{count:,} records by the columns {_listed(columns)}" for columns, count in self._n_by_columns.items()
        ]
        if self._n_exams:
            lines.append(f"{self._n_exams:,} exam questions, asked as in evaluation ({self._exam_format})")
        lines += self.reading.lines()
        lines += [f"{path} is {encoding}" for path, encoding in self._encodings.items()]
        return lines + [f"{path} has its cells separated by {mark!r}" for path, mark in self._separators.items()]

    @property
    def column_flags(self) -> str:
        """How the columns are named by hand."""
        names = ("question", "answer") if self._make is to_dialogue else ("question", "chosen", "rejected")
        return " ".join(f"--{name}_column NAME" for name in names)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
