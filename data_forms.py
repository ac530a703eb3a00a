"""Data in the forms people have: other encodings, files and columns read, the guide's records written.

    reader = ForeignReader("dialogues")
    for item in reader.read(files):  # a Dialogue, or the BadRecord that says what is wrong
        if isinstance(item, Dialogue):
            file.write(guide_line(item))
    print("\\n".join(reader.found()))  # what was read as what

records.py reads what a stage may be given; this is for the tools that make it from something else.
"""

import argparse
import codecs
import functools
import gzip
import html
import json
import re
import zlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from html.entities import html5
from itertools import accumulate, islice
from pathlib import Path
from typing import Literal

import orjson

from dialects import (
    ANSWERS,
    ASIDE,
    KEYS_READ,
    QUESTIONS,
    SCORES,
    SPEAKER,
    has_dialect,
    is_read_whole,
    lacks_prompt,
    reads_as_turns,
)
from errors import Unusable, UserError
from raw_files import UTF16_MARKS, utf16_without_mark
from record_keys import Reading, sort_keys, split_keys
from record_values import is_empty, kind_of, parsed, text_of, with_values
from records import (
    TEXT_ENDINGS,
    BadRecord,
    Dialogue,
    Document,
    Pair,
    Report,
    csv_separator,
    ending_of,
    find_files,
    read_dialogues,
    read_documents,
    read_pairs,
    read_raw,
    to_dialogue,
    to_pair,
)

# ---------------------------------------------------------------- encodings

UTF8 = "utf-8-sig"  # with or without a byte order mark


def detect_encoding(path: Path) -> str:
    """UTF-8, UTF-16 or -32, or GB18030 (with GBK and GB2312), judged by the first megabyte that is not ASCII."""
    open_bytes = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with open_bytes(path, "rb") as file:
            block = file.read(1 << 20)
            if block.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
                return "utf-32"
            if block.startswith(UTF16_MARKS):
                return "utf-16"
            if encoding := utf16_without_mark(block):
                return encoding.lower()
            while block and block.isascii():
                block = file.read(1 << 20)
    except (EOFError, OSError, zlib.error):
        return UTF8  # the reader names the fault
    # Stray bytes in UTF-8 are few. Other 8-bit encodings may pass for GB18030, but not for its core, GB2312.
    is_chinese = _undecodable_share(block, "utf-8") > 0.1 and _undecodable_share(block, "gb2312") < 0.1
    return "gb18030" if is_chinese else UTF8


def _undecodable_share(block: bytes, encoding: str) -> float:
    """The share of the bytes above ASCII that do not decode."""
    n_high = len(block.translate(None, bytes(range(128))))
    text = block.decode(encoding, errors="surrogateescape")
    return len(re.findall("[\udc80-\udcff]", text)) / n_high if n_high else 0.0


def known_encoding(name: str) -> str:
    """For argparse: an encoding that Python has."""
    try:
        codec = codecs.lookup(name).name
    except LookupError:
        raise argparse.ArgumentTypeError(f"no encoding {name!r}; known are utf-8, gb18030, big5, utf-16 ...") from None
    return UTF8 if codec == "utf-8" else codec


# ---------------------------------------------------------------- HTML

_BLOCK_TAGS = (
    "address|article|aside|blockquote|body|br|caption|center|dd|div|dl|dt|figcaption|figure|footer|form|h[1-6]|head|"
    "header|hr|html|li|main|meta|nav|ol|option|p|pre|section|select|table|tbody|tfoot|thead|title|tr|ul"
)
_INLINE_TAGS = (
    "a|abbr|b|big|button|cite|code|del|em|font|i|iframe|img|input|ins|kbd|label|link|mark|q|s|samp|small|span|strike|"
    "strong|sub|sup|td|th|tt|u|var|video"
)
_TAG = re.compile(
    rf"<(?P<slash>/?)(?:(?P<block>{_BLOCK_TAGS})|(?P<inline>{_INLINE_TAGS}))"
    # What is surely a tag: "<90 mmHg" and "x<a and b>c" are none.
    r"""(?:\s+[\w:@.-]+\s*=\s*(?:"[^"]*"|'[^']*'|[^\s<>"'=]+)|\s+(?:hidden|disabled|checked|controls))*\s*/?>""",
    re.IGNORECASE,
)
_BLOCK_OR_END = re.compile(rf"\s*(?:</?(?:{_BLOCK_TAGS})\b|\Z)", re.IGNORECASE)
_NOT_SHOWN = re.compile(
    r"<!--.*?-->|<!doctype[^>]*>|<(script|style|noscript|template)\b[^>]*>.*?</\1\s*>", re.DOTALL | re.IGNORECASE
)
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,30});")


def without_html(text: str) -> str:
    """HTML as plain text: a line for each block, a blank between cells, powers with ^, entities as characters."""
    if "&" in text:
        for _ in range(2):  # &amp;nbsp; is common
            text = _ENTITY.sub(_character, text)
    return _TAG.sub(_instead_of_tag, _NOT_SHOWN.sub("", text)) if "<" in text else text


def _character(entity: re.Match[str]) -> str:
    is_known = entity[0].startswith("&#") or entity[0][1:] in html5
    return html.unescape(entity[0]) if is_known else entity[0]


def _instead_of_tag(tag: re.Match[str]) -> str:
    if tag["block"]:
        # The next block starts its own line.
        return "" if tag["slash"] and _BLOCK_OR_END.match(tag.string, tag.end()) else "\n"
    return "" if tag["slash"] else {"sup": "^", "td": " ", "th": " "}.get(tag["inline"].lower(), "")


# ---------------------------------------------------------------- columns of published data


@dataclass(frozen=True)
class _Form:
    """What published records have, in lower case, and how one becomes a record that records.py reads."""

    columns: tuple[str, ...]
    convert: Callable[[dict], dict]
    names: Mapping[str, str] = field(default_factory=dict)  # for each name of ours the file's


def _from_title_and_ask(record: dict) -> dict:
    """The title is the question in short; the long one often repeats it."""
    title, ask = (str(record.pop(key, None) or "").strip() for key in ("title", "ask"))
    return {**record, "question": ask if title in ask else title if ask in title else f"{title}\n{ask}"}


def _with_reasoning(how: str, record: dict) -> dict:
    """The reply, with what was thought before it if that is asked for."""
    answer, thought = record.pop("response"), record.pop("complex_cot")
    if how != "leave_out" and not isinstance(thought, str | None):
        raise Unusable("not text", f"'complex_cot' is {kind_of(thought)}; it must be a string")
    if how != "leave_out" and isinstance(answer, str) and isinstance(thought, str) and thought.strip():
        answer = _REASONING[how].format(thought.strip(), answer.strip())
    return {**record, "answer": answer}


_REASONING = {
    "leave_out": "{1}",
    "think_tags": "<think>\n{0}\n</think>\n\n{1}",
    "headings": "## Thinking\n\n{0}\n\n## Final Response\n\n{1}",
}


def _from_spoken_list(key: str, record: dict) -> dict:
    """A list of turns, or of strings that start with who speaks; where none does, the two take turns."""
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
    """The record with other keys; of a list of wordings (`questions`) the first."""
    renamed = {}
    for key, value in record.items():
        if key in ("questions", "answers") and isinstance(value, list):
            value = next((text for text in value if not is_empty(text)), "")
        renamed[names.get(key, key)] = value
    return renamed


def _dialogue_form(keys: Sequence[str], reasoning: str) -> _Form | None:
    """The form of dialogues with these keys: Toyhom's, HuatuoGPT-o1's, HuatuoGPT's, MedDialog's, DISC-Med-SFT's ..."""
    if "ask" in keys and "answer" in keys:
        return _Form(tuple(key for key in ("title", "ask", "answer") if key in keys), _from_title_and_ask)
    if {"question", "complex_cot", "response"} <= set(keys):
        return _Form(("question", "complex_cot", "response"), functools.partial(_with_reasoning, reasoning))
    alpaca = {"instruction": ("instruction", "指令"), "input": ("input", "输入")}
    for wanted in ({"question": QUESTIONS}, alpaca):
        if form := _renaming_form(keys, wanted | {"answer" if "question" in wanted else "output": ANSWERS}):
            return form
    lists = [key for key in keys if key in _TURNS]
    if len(lists) != 1:
        return None
    return _Form((lists[0],), functools.partial(_from_spoken_list, lists[0]), {"conversations": lists[0]})


def _pair_form(keys: Sequence[str], reasoning: str) -> _Form | None:
    wanted = {"question": QUESTIONS, "response_chosen": _CHOSEN, "response_rejected": _REJECTED}
    # A question and its answer may have only the rejected one beside them.
    return _renaming_form(keys, wanted) or _renaming_form(keys, wanted | {"response_chosen": ANSWERS})


def _renaming_form(keys: Sequence[str], wanted: dict[str, Sequence[str]]) -> _Form | None:
    """The one key that means each of what is wanted; None where one has no key, or several and so is unclear."""
    found = {name: [key for key in keys if key in meanings] for name, meanings in wanted.items()}
    if any(len(meant) != 1 for meant in found.values()):
        return None
    names = {meant[0]: name for name, meant in found.items()}
    own_names = {name: key for key, name in names.items()}
    return _Form(tuple(names), functools.partial(_renamed, names), own_names)


_COLUMNS = {*QUESTIONS, *ANSWERS, *_CHOSEN, *_REJECTED}
_TURNS = ("data", "utterances", "conversation", "dialogue", "dialog", "dialogs", "turns", "items", "chat")
_READ = {*_COLUMNS, *_TURNS, *KEYS_READ, "title", "ask", "complex_cot"}
_READ_KEYS = tuple(sorted(_READ))


def _list_in_cell(value: object) -> object:
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(Unusable):  # words in brackets
            return parsed(value, "")
    return value


def rows_of(record: object) -> list[dict] | None:
    """The records of one that holds columns, as lists or as pandas' `{"0": ..., "1": ...}`; None for any other."""
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


# ---------------------------------------------------------------- columns that the user names


@dataclass(frozen=True)
class Columns:
    """Columns named by flags, "" where none is; several of `question` are joined by line breaks."""

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
        "--reasoning", choices=tuple(_REASONING), default="leave_out",
        help="what becomes of HuatuoGPT-o1's Complex_CoT: left out, or in front of the reply in <think> tags or "
        "under that model's headings",
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


def reader_of(args: argparse.Namespace, kind: Literal["dialogues", "pairs"]) -> "ForeignReader":
    """The reader that the flags describe; UserError where they name some columns and not all that are needed."""
    names = {name: getattr(args, f"{name}_column") for name in ("answer", "chosen", "rejected", "system", "history")}
    columns = Columns(tuple(args.question_column), **names)
    needed = ("question", "answer") if kind == "dialogues" else ("question", "chosen", "rejected")
    lacking = [f"--{name}_column" for name in needed if not getattr(columns, name)]
    if columns != Columns() and lacking:
        raise UserError(f"{' and '.join(lacking)}: name these too; with one column named, none is found by itself")
    return ForeignReader(kind, columns, args.encoding, args.reasoning, Reading(args.ignore_keys, args.role_map))


def known_roles(listed: str) -> dict[str, str]:
    """For argparse: `患者=user,医生=assistant`."""
    pairs = [pair.partition("=") for pair in listed.split(",") if pair.strip()]
    roles = {name.strip(): role.strip() for name, _, role in pairs}
    if unknown := [role for role in roles.values() if role not in ("system", "user", "assistant", "tool")]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no role; give NAME=user, assistant, system or tool")
    return roles


# ---------------------------------------------------------------- reading


def _by_own_names(fault: Unusable, names: Mapping[str, str]) -> Unusable:
    """The fault by the names of the file's columns, and not by what they are read as."""
    detail = re.sub(r"'(\w+)'", lambda name: f"'{names.get(name[1], name[1])}'", fault.detail)
    return Unusable(fault.reason, detail)


class ForeignReader:
    """Reads dialogues or pairs from files of any known form, one record at a time, and notes what it found."""

    def __init__(
        self,
        kind: Literal["dialogues", "pairs"],
        columns: Columns = Columns(),
        encoding: str | None = None,
        reasoning: str = "leave_out",
        reading: Reading | None = None,
    ):
        self.reading = reading or Reading()
        self._kind = kind
        self._make = to_dialogue if kind == "dialogues" else to_pair
        self._form_of = _dialogue_form if kind == "dialogues" else _pair_form
        self._columns = columns
        self._has_columns = columns != Columns()
        self._encoding = encoding
        self._reasoning = reasoning
        self._forms: dict[tuple, _Form | None] = {}  # by the keys of a record
        self._n_by_columns: Counter[tuple[str, ...]] = Counter()
        self._encodings: dict[Path, str] = {}
        self._separators: dict[Path, str] = {}

    def read(self, files: Sequence[Path]) -> Iterator[Dialogue | Pair | BadRecord]:
        """One result a record, in order."""
        for path in files:
            for source, record in self.read_raw(path):
                try:
                    yield self.convert(record, source)
                except Unusable as error:
                    yield BadRecord(source, error.reason, error.detail)

    def read_raw(self, path: Path) -> Iterator[tuple[str, object]]:
        """The records of a file as they are, in the encoding that was given or found; of whole columns the rows."""
        encoding = self.encoding_of(path)
        if ending_of(path) in (".csv", ".tsv") and (separator := csv_separator(path, encoding)) != ",":
            self._separators[path] = separator
        for source, record in read_raw(path, encoding):
            if isinstance(record, Unusable) and record.reason == "not UTF-8":
                reason = record.reason if encoding == UTF8 else f"not {encoding}"
                record = Unusable(reason, "a byte has no meaning there; mend it, or name the file's --encoding")
            rows = rows_of(record)
            if rows is None:
                yield source, record
            else:
                yield from ((f"{source} (row {number})", row) for number, row in enumerate(rows, 1))

    def encoding_of(self, path: Path) -> str:
        """The encoding that was given or is found; noted where it is not UTF-8."""
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
                return self._make(self._by_columns(record), source, self.reading)
            except Unusable as fault:
                raise _by_own_names(fault, self._columns.names) from None
        if not isinstance(record, dict):
            return self._make(record, source, self.reading)
        record = self.reading.without_ignored(record)
        present = with_values(record)
        keys = tuple(present)
        if is_read_whole(keys, self._kind):
            return self._make(present, source, self.reading)
        form = self._form_by_keys(keys) or self._form_by_keys(tuple(record))
        if form is None:
            return self._make(record, source, self.reading)
        try:
            item = self._make(form.convert(self._lowered(record)), source, self.reading)
        except Unusable as fault:
            raise _by_own_names(fault, form.names) from None
        self._n_by_columns[form.columns] += 1
        return item

    def _form_by_keys(self, keys: tuple[str, ...]) -> _Form | None:
        if keys not in self._forms:
            self._forms[keys] = self._find_form(keys)
        return self._forms[keys]

    def _find_form(self, keys: tuple[str, ...]) -> _Form | None:
        """How records with these keys are converted; None where records.py knows them, or nobody does."""
        if has_dialect(keys, self._kind):
            return self._form_of(keys, self._reasoning) if lacks_prompt(keys) else None
        lower = tuple(dict.fromkeys(key.strip().lower() for key in keys))
        if lower != keys and has_dialect(lower, self._kind):
            return _Form(keys, lambda lowered: lowered)
        return self._form_of(lower, self._reasoning)

    def _lowered(self, record: dict) -> dict:
        """The record with the names that are read in lower case; advice names the others as they are."""
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
            asked = {name: record[name] for name in columns.question if not is_empty(record[name])}
            texts = (text if isinstance(text, int | float) else text_of(text, name) for name, text in asked.items())
            question = "\n".join(map(str, texts))
        record = self.reading.without_ignored(record)
        beside = tuple(key for key in record if key not in used and not is_empty(record[key]))
        plan = sort_keys(beside, _READ_KEYS)
        kept_keys = [key for key in ("history", *ASIDE, *SCORES) if key in beside]
        kept_keys += plan.that_matter + plan.unknown
        return {key: record[key] for key in kept_keys} | {"question": question} | values

    def found(self) -> list[str]:
        """A line for each form and encoding that was not what records.py reads, and for what was met in the records."""
        lines = [
            f"{count:,} records by the columns {_listed(columns)}" for columns, count in self._n_by_columns.items()
        ]
        if self._reasoning == "leave_out" and any("complex_cot" in columns for columns in self._n_by_columns):
            lines.append("'complex_cot' is left out; --reasoning think_tags keeps it")
        lines += self.reading.lines()
        lines += [f"{path} is {encoding}" for path, encoding in self._encodings.items()]
        return lines + [f"{path} has its cells separated by {mark!r}" for path, mark in self._separators.items()]

    @property
    def column_flags(self) -> str:
        """How the columns are named by hand."""
        names = ("question", "answer") if self._make is to_dialogue else ("question", "chosen", "rejected")
        return " ".join(f"--{name}_column NAME" for name in names)


def dropped_lines(report: Report) -> list[str]:
    """For each reason why records were dropped, the first of them."""
    return [
        f"{count:,} dropped, {reason}: {'; '.join(report.examples[reason])}"
        for reason, count in report.dropped.most_common()
    ]


def unread_lines(unread: Sequence[Path]) -> list[str]:
    """The files that a tool found and has no reader for."""
    more = f" and {len(unread) - 5} more" if len(unread) > 5 else ""
    return [f"not read, by their endings: {', '.join(map(str, unread[:5]))}{more}"] if unread else []


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


# ---------------------------------------------------------------- writing


def guide_record(item: Dialogue | Pair) -> dict:
    """The guide's record of a dialogue or a pair; `records.py` reads it back to the same."""
    return _dialogue_record(item) if isinstance(item, Dialogue) else _pair_record(item)


def guide_line(item: Dialogue | Pair) -> str:
    """The guide's record as a line of a .jsonl file."""
    record = guide_record(item)
    try:
        return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE).decode()
    except TypeError:  # an integer of more than 64 bits, in tools
        return json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n"


def _dialogue_record(dialogue: Dialogue) -> dict:
    messages = dialogue.messages
    record = {}
    if messages[0]["role"] == "system":
        record["system"] = messages[0]["content"]
        messages = messages[1:]
    if dialogue.tools:
        record["tools"] = dialogue.tools
    record["conversations"] = [_sharegpt_turn(message) for message in messages]
    return record


_SHAREGPT_NAMES = {"user": "human", "assistant": "gpt", "tool": "observation"}


def _sharegpt_turn(message: dict) -> dict:
    calls = message.get("tool_calls")
    if calls and not message["content"]:
        weight = {"weight": message["weight"]} if "weight" in message else {}
        return {"from": "function_call", "value": json.dumps(calls, ensure_ascii=False), **weight}
    turn = {"from": _SHAREGPT_NAMES[message["role"]], "value": message["content"]}
    if len(message) == 2:
        return turn
    return turn | {key: message[key] for key in ("tool_calls", "weight") if key in message}


def _pair_record(pair: Pair) -> dict:
    """The guide's form, or the turns as `conversations` where it cannot say them: tools, texts that are dialogues."""
    messages, system = pair.messages, ""
    if messages[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    others = {} if pair.margin is None else {"margin": pair.margin}
    others |= {"tools": pair.tools} if pair.tools else {}
    texts = (messages[-1]["content"], pair.chosen, pair.rejected)
    used_tools = any(message["role"] == "tool" or message.get("tool_calls") for message in messages[:-1])
    if used_tools or any(map(reads_as_turns, texts)):
        turns = [_sharegpt_turn(message) for message in messages]
        replies = {key: {"from": "gpt", "value": getattr(pair, key)} for key in ("chosen", "rejected")}
        return {"system": system, "conversations": turns, **replies, **others}
    said = [message["content"] for message in messages]
    return {
        "system": system,
        "history": [list(exchange) for exchange in zip(said[:-1:2], said[1:-1:2], strict=True)],
        "question": said[-1],
        "response_chosen": pair.chosen,
        "response_rejected": pair.rejected,
        **others,
    }


# ---------------------------------------------------------------- what a folder holds

Kind = Literal["dialogues", "pairs", "documents"]
READERS = {"dialogues": read_dialogues, "pairs": read_pairs, "documents": read_documents}

# Of a file whose first records are all faulty, so many are looked at.
_PROBED = 100
# Why a record is no dialogue, faulty or not.
_KINDS_BY_REASON: dict[str, Kind] = {"preference pair": "pairs", "plain text": "documents"}


def find_kind(path: str | Path, flag: str) -> tuple[Kind, list[Path], list[Path]]:
    """What the records at `path` are, the files that the stage for them reads, and those it does not.

    Lines of .txt files are documents where nothing else is there. Raises UserError where two kinds are mixed.
    """
    files, unread = find_files(path, flag, TEXT_ENDINGS)
    of_records = [file for file in files if not is_plain_text(file)]
    first_of_kind: dict[Kind, Path] = {}
    for file in of_records:
        if kind := _kind_of(file):
            first_of_kind.setdefault(kind, file)
    if len(first_of_kind) > 1:
        found = " and ".join(f"{kind} ({file})" for kind, file in first_of_kind.items())
        raise UserError(f"{flag} {path}: holds {found}, which no stage reads together; name one of them")
    kind = next(iter(first_of_kind), "dialogues" if of_records else "documents")
    if kind == "documents":
        return kind, files, unread
    return kind, of_records, sorted([*unread, *(file for file in files if is_plain_text(file))])


def is_plain_text(path: Path) -> bool:
    return path.name.lower().endswith((".txt", ".txt.gz"))


def _kind_of(path: Path) -> Kind | None:
    """Dialogues, if a record is one; otherwise what the first record is that is of a kind at all."""
    kind = None
    try:
        for result in islice(read_dialogues([path]), _PROBED):
            if not isinstance(result, BadRecord):
                return "dialogues"
            kind = kind or _KINDS_BY_REASON.get(result.reason)
    except UserError:  # whoever reads the whole file says what is wrong with it
        pass
    return kind


# A first turn of fewer letters is a greeting; what follows it is the question.
_SHORTEST_QUESTION = 6


def question_of(record: Dialogue | Pair | Document) -> str:
    """What is asked: the first of the user's turns, those before it that only greet included; of a document, all."""
    if isinstance(record, Document):
        return record.text
    question = ""
    for message in record.messages:
        if message["role"] == "user":
            question += f"\n{message['content']}" if question else message["content"]
            if sum(map(str.isalnum, question)) >= _SHORTEST_QUESTION:
                break
    return question


def words_of(record: Dialogue | Pair | Document) -> str:
    """All that is said in a record but the system prompt, which many share: by this, near copies are found."""
    if isinstance(record, Document):
        return record.text
    said = [
        message["content"] or json.dumps(message.get("tool_calls"), ensure_ascii=False)
        for message in record.messages
        if message["role"] != "system"
    ]
    return "\n".join([*said, record.chosen, record.rejected] if isinstance(record, Pair) else said)


def lengths_at(lengths: Counter[int], shares: Sequence[float]) -> list[int]:
    """For each share, the length that so many of the records have at most; one that occurs."""
    ordered = sorted(lengths)
    up_to = list(accumulate(lengths[length] for length in ordered))
    return [ordered[bisect_left(up_to, share * up_to[-1])] for share in shares]


# ---------------------------------------------------------------- flags that count tokens

# The limits of the stages: of which kind of records, and by default how many tokens.
LIMITS: dict[str, tuple[Kind, int, str]] = {
    "model_max_length": ("dialogues", 2048, "dialogue"),
    "max_source_length": ("pairs", 1024, "prompt of a pair"),
    "max_target_length": ("pairs", 512, "reply of a pair"),
}


def add_token_flags(parser: argparse._ActionsContainer) -> None:
    """The tokenizer, and the flags that say how a stage would use it."""
    parser.add_argument("--model_name_or_path", "--tokenizer", dest="tokenizer", help="hub name or folder of the model")
    parser.add_argument("--template_name", help="named prompt template instead of the tokenizer's own")
    for name, (_, default, what) in LIMITS.items():
        parser.add_argument(f"--{name}", type=int, help=f"tokens of the longest {what} (default: {default})")


def settle_token_flags(args: argparse.Namespace, kind: Kind) -> list[str]:
    """Set the limits of this kind that were not given, with a tokenizer; a note for each given that it does not have.

    Raises UserError where there is no tokenizer to count by, or nothing fits.
    """
    for name in ("template_name", *LIMITS):
        value = getattr(args, name)
        if value is not None and not args.tokenizer:
            raise UserError(f"--{name} {value}: counts in tokens, so name the model too: --model_name_or_path")
        if name in LIMITS and value is not None and value < 8:
            raise UserError(f"--{name} {value}: nothing fits; give a number of tokens")
    notes = []
    for name, (limited, default, _) in LIMITS.items():
        value = getattr(args, name)
        if limited != kind:
            notes += [f"--{name} {value}: limits {limited}, and these are {kind}"] if value is not None else []
            setattr(args, name, None)
        elif value is None and args.tokenizer:
            setattr(args, name, default)
    return notes


def limits_of(args: argparse.Namespace) -> str:
    """The limits that hold, as flags."""
    return " ".join(f"--{name} {getattr(args, name)}" for name in LIMITS if getattr(args, name) is not None)
