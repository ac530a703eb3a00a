"""The dialects of records: which form one has, by its keys alone, and how it becomes turns.

    present, plan = planned(record, dialogue_plan, Reading())
    turns = plan.dialect.read(present, Reading())

A turn is a message as records.Dialogue holds it. Whoever cannot be read raises Unusable.
"""

import functools
import itertools
import re
import string
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from errors import Unusable
from record_keys import (
    THOUGHTS,
    KeyPlan,
    Reading,
    check_prompt_keys,
    check_reply_keys,
    is_harmless,
    letter_of,
    sort_keys,
)
from record_values import (
    NAME_KEYS,
    NESTED,
    NO_TEXT,
    is_empty,
    is_parts,
    is_turns,
    kind_of,
    nearest,
    optional_text,
    parsed,
    quoted,
    stripped,
    suspects,
    text_of,
    with_values,
)

# --------------------------------------------------------------------------------------------------
# Turns: who says what
# --------------------------------------------------------------------------------------------------

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "patient", "prompter", "client", "用户", "患者", "病人", "提问者", "问"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai", "doctor", "助手", "医生", "机器人", "答"),
        "assistant",
    ),
    **dict.fromkeys(("tool", "observation", "function", "tool_response", "tool_result", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "tool call"),
}
# Who speaks, at the start of a text or of a line in it.
_SPEAKERS = {name: role for name, role in ROLES.items() if role in ("user", "assistant")}
_NAMES = rf"(?:#+[ \t]*|\*\*)?({'|'.join(_SPEAKERS)})(?:\*\*)?"
SPEAKER = re.compile(rf"[ \t]*{_NAMES}[ \t]*[:：](?:\*\*)?[ \t]*", re.IGNORECASE)
_SPEAKER_LINE = re.compile(rf"^{SPEAKER.pattern}", re.IGNORECASE | re.MULTILINE)


def role_of(name: object, where: str, reading: Reading) -> str:
    """The role that a name stands for, capitals and blanks around it aside: also "tool call"."""
    role = None
    if isinstance(name, str | int):
        role = (reading.role_map or {}).get(str(name).strip()) or ROLES.get(str(name).strip().lower())
    if role is None:
        script = "" if reading.role_map is not None else "scripts/convert_data_format.py "
        advice = f"; {script}--role_map {name}=user says who it is" if isinstance(name, str | int) else ""
        raise Unusable("unknown role", f"{where} is from {name!r}; known are {', '.join(ROLES)}{advice}")
    return role


def _turns_of_list(key: str, record: dict, reading: Reading) -> list[dict]:
    """Read ShareGPT's `conversations` and OpenAI's `messages`; either list may hold either form of turn."""
    value = record[key]
    if isinstance(value, str) and (turns := turns_of_transcript(value)):
        return turns
    turns = parsed(value, f"'{key}'")
    if isinstance(turns, dict):  # one exchange, or columns of a struct, as `datasets` holds a list of objects
        form = _turn_form(tuple(turns))
        columns = [column for column in turns.values() if isinstance(column, list)]
        if form.name and len(columns) == len(turns):
            turns = [dict(zip(turns, row, strict=False)) for row in zip(*columns, strict=False)]
        elif form.sides:
            turns = [turns]
    if not isinstance(turns, list):
        raise Unusable("not a list", f"'{key}' is {kind_of(turns)}; it must be a list of turns")
    return _read_turns(turns, reading)


def _read_turns(turns: list, reading: Reading, of: str = "") -> list[dict]:
    messages = []
    for number, turn in enumerate(turns, 1):
        if message := _plain_message(turn, reading):
            messages.append(message)
        else:
            messages += _messages(turn, f"turn {number}{of}", reading)
    return messages


# Where the words of a turn stand; and the two sides of an exchange in one object.
_CONTENT_KEYS = ("value", "content", "parts", "text", "utterance", "sentence")
_SIDES = (
    ("human", "assistant"), ("human", "gpt"), ("human", "bot"), ("user", "assistant"), ("user", "bot"),
    ("input", "output"), ("question", "answer"), ("prompt", "response"), ("query", "response"), ("患者", "医生"),
    ("patient", "doctor"), ("问", "答"), ("用户", "助手"), ("Human", "Assistant"), ("User", "Assistant"),
    ("instruction", "output"),
)  # fmt: skip


_SIDE_KEYS = frozenset(itertools.chain(*_SIDES))


@dataclass(frozen=True)
class _TurnForm:
    """The keys of a turn: who speaks, the words, or both sides of an exchange; and what the other keys mean."""

    name: str
    content: str
    sides: tuple[str, str] | None
    plan: KeyPlan
    is_plain: bool = False  # a name and its words, and nothing that matters


@functools.lru_cache(maxsize=4000)
def _turn_form(keys: tuple[str, ...]) -> _TurnForm:
    name = next((key for key in NAME_KEYS if key in keys), "")
    if name:
        content = next((key for key in _CONTENT_KEYS if key in keys), "")
        read = (
            name,
            content,
            "tool_calls",
            "function_call",
            *(("from", "role", "value", "content") if content else ()),
        )
        plan = sort_keys(keys, read)
        is_plain = bool(content) and not set(keys) & set(read) - {name, content} and not plan.that_matter + plan.unknown
        return _TurnForm(name, content, None, plan, is_plain)
    for sides in _SIDES:
        if all(side in keys for side in sides):
            return _TurnForm("", "", sides, sort_keys(keys, ("system", *sides)))
    return _TurnForm("", "", None, sort_keys(keys, keys))


def _plain_message(turn: object, reading: Reading) -> dict | None:
    """The message of a turn that is nothing but a name and its words, as nearly all are; None for any other."""
    if not isinstance(turn, dict) or reading.role_map or reading.ignore_keys:
        return None
    form = _turn_form(tuple(turn))
    if not form.is_plain or type(name := turn[form.name]) is not str or (role := ROLES.get(name)) not in NO_TEXT:
        return None
    try:
        return {"role": role, "content": text_of(turn[form.content], "", NO_TEXT[role] if reading.null_words else ())}
    except Unusable:
        return None  # to be raised with its place


def _messages(turn: object, where: str, reading: Reading) -> list[dict]:
    """Read a turn: `{"from", "value"}`, `{"role", "content", "tool_calls"}`, or an exchange in one object."""
    if not isinstance(turn, dict):
        raise Unusable("not an object", f"{where} is {kind_of(turn)}; it must be an object with role and content")
    given = turn
    # Parquet gives every struct the keys of all.
    present = {key: value for key, value in turn.items() if value is not None}
    turn = reading.without_ignored(present)
    form = _turn_form(tuple(turn))
    reading.note_keys(form.plan.unknown, "of turns")
    if form.sides:
        return _exchange_of_turn(turn, form, where, reading)
    calls = turn.get("tool_calls") or turn.get("function_call")
    if not form.name or not (form.content or calls):
        if (form.name and any(key in given for key in _CONTENT_KEYS)) or _turn_form(tuple(given)).sides:
            speaker = f" ({turn[form.name]})" if form.name else ""
            raise Unusable("null value", f"{where}{speaker} is null; write the text or delete the record")
        raise Unusable(
            "unknown keys",
            f"{where} has {quoted(given)}; known are 'from' and 'value', or 'role' and 'content'"
            + nearest(given, ("from", "value", "role", "content", "tool_calls")),
        )
    role = role_of(turn[form.name], where, reading)
    where = f"{where} ({turn[form.name]})"
    content = turn.get(form.content)
    if form.content == "value" and not is_empty(turn.get("content")) and turn["content"] != content:
        raise Unusable("two forms", f"{where} has one text in 'value' and another in 'content'; keep one of them")

    if role == "tool call":
        message = {"role": "assistant", "content": "", "tool_calls": _tool_calls(content or calls, where)}
    elif not calls:
        message = {"role": role, "content": text_of(content, where, NO_TEXT[role] if reading.null_words else ())}
    elif role != "assistant":
        raise Unusable("broken tool call", f"{where} has tool_calls; only the assistant calls tools")
    else:
        text = "" if content is None else text_of(content, where)
        message = {"role": role, "content": text, "tool_calls": _tool_calls(calls, where)}
    if form.plan.that_matter:
        _honour_keys(message, turn, form.plan, reading, where)
    return [message]


def _honour_keys(message: dict, turn: dict, plan: KeyPlan, reading: Reading, where: str) -> None:
    """Mark a reply that is not to be learned by OpenAI's `"weight": 0`."""
    if message["role"] != "assistant":
        check_prompt_keys(turn, plan, reading, where)
    elif check_reply_keys(turn, plan, reading, where, message["content"], of_turn=True):
        message["weight"] = 0


def _exchange_of_turn(turn: dict, form: _TurnForm, where: str, reading: Reading) -> list[dict]:
    """Both sides of an exchange, perhaps after a system prompt; without a question the reply alone."""
    if others := [key for key in turn if key in _SIDE_KEYS and key not in form.sides and not is_empty(turn[key])]:
        raise Unusable("two forms", f"{where} has {quoted([*form.sides, *others])}; {reading.ignoring(*others)}")
    asked, answered = (text_of(turn[side], f"{where} ('{side}')") for side in form.sides)
    reply = {"role": "assistant", "content": answered}
    if form.plan.that_matter:
        _honour_keys(reply, turn, form.plan, reading, where)
    system = optional_text(turn, "system")
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *asking_turns(asked, where), reply]


def turns_of_transcript(text: str) -> list[dict] | None:
    """The turns of a text in which each line that starts one says who speaks; None for any other text.

    HH-RLHF's `\\n\\nHuman: ...\\n\\nAssistant: ...`; an empty last reply asks for one. The person speaks first: a text
    that only quotes a speaker somewhere is no transcript. Raises Unusable where one speaks twice in a row.
    """
    if ":" not in text and "：" not in text:
        return None
    text = text.strip()
    first = SPEAKER.match(text)
    if first is None or _SPEAKERS[first[1].lower()] != "user":
        return None
    starts = list(_SPEAKER_LINE.finditer(text))
    roles = [_SPEAKERS[start[1].lower()] for start in starts]
    if "assistant" not in roles:
        return None
    if any(role == after for role, after in itertools.pairwise(roles)):
        raise Unusable(
            "broken transcript",
            f"{text[:30]!r}... has turns by name, of which two in a row are from the same; join them, or put a line in "
            "front that names nobody and keeps it one text",
        )
    ends = [*(start.start() for start in starts[1:]), len(text)]
    contents = [stripped(text[start.end() : end]) for start, end in zip(starts, ends, strict=True)]
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def reads_as_turns(text: str) -> bool:
    """Whether a text in place of turns is read as turns, or refused as a broken form of them."""
    if ":" not in text and "：" not in text:
        return False
    try:
        return bool(_TURNS_IN_A_CELL.match(text) or turns_of_transcript(text))
    except Unusable:
        return True


def asking_turns(text: str, where: str) -> list[dict]:
    """What is asked, as the user's turn, or as the turns that it is a transcript of."""
    turns = turns_of_transcript(text) or [{"role": "user", "content": text}]
    if turns[-1]["role"] != "user":
        raise Unusable(
            "broken transcript",
            f"{where} ends with the assistant's words, which nobody asks about; add the question, or put a line in "
            "front that names nobody and keeps it one text",
        )
    return turns


def _tool_calls(calls: object, where: str) -> list[dict]:
    """Read OpenAI's `{"function": {"name", "arguments"}}` or plain `{"name", "arguments"}`, one or a list."""
    calls = parsed(calls, f"the tool call of {where}")
    read = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = (call.get("function") or call) if isinstance(call, dict) else {}
        name = function.get("name") if isinstance(function, dict) else None
        arguments = _without_nulls(function.get("arguments")) if isinstance(function, dict) else None
        arguments = parsed(arguments or {}, f"the arguments of the tool call of {where}")
        if not (name and isinstance(name, str) and isinstance(arguments, dict)):
            raise Unusable("broken tool call", f"{where} needs a name and an object of arguments, found {call!r:.80}")
        read.append({"name": name, "arguments": arguments})
    return read


def tools_of(record: dict) -> list[dict] | None:
    if "tools" not in record and "functions" not in record:
        return None
    tools = record.get("tools") or record.get("functions")
    if is_empty(tools):
        return None
    tools = _without_nulls(parsed(tools, "'tools'")) or []
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise Unusable("broken tools", f"'tools' is {tools!r:.80}; it must be a list of objects")
    return tools or None


def _without_nulls(value: object) -> object:
    """Objects without the keys that are null: columns of structs, as in parquet, give each the keys of all."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


# --------------------------------------------------------------------------------------------------
# Dialects: each turns a record into turns; the keys of the record decide which
# --------------------------------------------------------------------------------------------------


def _turns_of_alpaca(record: dict, reading: Reading) -> list[dict]:
    """Read an instruction, the input it is about on the next line, and the output."""
    return [*_prompt_of_alpaca(record, reading), *_reply_turns("output", record, reading)]


def _prompt_of_alpaca(record: dict, reading: Reading) -> list[dict]:
    instruction, about = text_of(record["instruction"], "'instruction'"), optional_text(record, "input")
    question = f"{instruction}\n{about}" if instruction and about else instruction or about
    return [*_history(record, reading), *asking_turns(question, "'instruction'")]


def _turns_of_question(record: dict, reading: Reading) -> list[dict]:
    return [*_prompt_of_text("question", record, reading), *_reply_turns("answer", record, reading)]


def _prompt_of_text(key: str, record: dict, reading: Reading) -> list[dict]:
    """What is asked as a text or as turns, after the history."""
    where = f"'{key}'"
    turns = _turns_in(record[key], where, reading) or asking_turns(text_of(record[key], where), where)
    return [*_history(record, reading), *turns]


def _reply_turns(key: str, record: dict, reading: Reading) -> list[dict]:
    where = f"'{key}'"
    turns = _turns_in(record[key], where, reading)
    return turns or [{"role": "assistant", "content": text_of(record[key], where)}]


# Turns as JSON, as csv and parquet hold them; a text may itself be JSON of another kind.
_TURNS_IN_A_CELL = re.compile(r"""\s*\[?\s*\{\s*["'](from|role|value|content)["']\s*:""")


def _turns_in(value: object, where: str, reading: Reading) -> list[dict] | None:
    """The turns of a list of them, perhaps in a cell; None for any other value."""
    if isinstance(value, str):
        if "{" not in value or not _TURNS_IN_A_CELL.match(value):
            return None
        value = parsed(value, where)
    return _read_turns(value, reading, f" of {where}") if is_turns(value) else None


def _history(record: dict, reading: Reading) -> list[dict]:
    """Read the earlier exchanges of a record, as [question, answer] or as turns."""
    if "history" not in record:
        return []
    history = record["history"]
    history = None if is_empty(history) else parsed(history, "'history'")
    history = [] if history is None else history
    turns = []
    for number, exchange in enumerate(history if isinstance(history, list) else [history], 1):
        where = f"exchange {number} of 'history'"
        if isinstance(exchange, dict):
            turns += _messages(exchange, where, reading)
        elif isinstance(exchange, list) and len(exchange) == 2:
            question, answer = (text_of(text, where) for text in exchange)
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        else:
            raise Unusable("broken history", f"{where} is {exchange!r:.80}; it must be [question, answer]")
    return turns


@dataclass(frozen=True)
class _Dialect:
    """A form of records: the keys it needs and may have, and what reads one of its records."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[dict, Reading], object]

    @property
    def has_turns(self) -> bool:
        """Its turns stand in a list, which says all of them."""
        return self.required[0] in (*_LISTS, "conversation")


_LISTS = ("conversations", "messages")
ASIDE = ("system", "system_prompt", "tools", "functions")
# Columns of published data, in lower case.
QUESTIONS = (
    "question", "questions", "query", "prompt", "instruction", "input", "inputs", "problem", "问题", "提问", "指令",
    "输入",
)  # fmt: skip
ANSWERS = (
    "answer", "answers", "response", "output", "completion", "reply", "target", "targets", "回答", "答案", "回复",
    "输出",
)  # fmt: skip
# The one rule of detection: the first dialect whose required keys the record has, whatever the file's name.
# A key that is null or empty (an empty csv cell) counts as absent. What other keys mean, record_keys.py says.
_DIALECTS = (
    *(_Dialect((key,), ASIDE, functools.partial(_turns_of_list, key)) for key in _LISTS),
    _Dialect(("instruction", "output"), ("input", "history", *ASIDE), _turns_of_alpaca),
    _Dialect(("question", "answer"), ("history", *ASIDE), _turns_of_question),
)
# What is to be answered may also come without a reply, and a text for pretraining without a question.
_PROMPT_DIALECTS = (
    *_DIALECTS,
    _Dialect(("conversation",), ASIDE, functools.partial(_turns_of_list, "conversation")),
    _Dialect(("instruction",), ("input", "history", *ASIDE), _prompt_of_alpaca),
    _Dialect(("question",), ("history", *ASIDE), functools.partial(_prompt_of_text, "question")),
)
_PREFERENCE_KEYS = (
    "response_chosen", "response_rejected", "chosen", "rejected", "good_answer", "bad_answer", "rejected_response",
    "rejected_messages",
)  # fmt: skip


@dataclass(frozen=True)
class RecordPlan:
    """How records with these keys are read: the dialect, the keys of other forms beside it, and what the rest means."""

    dialect: _Dialect
    other_forms: tuple[str, ...]
    keys: KeyPlan
    suspect: str  # what keys that are not read may be meant as

    @functools.cached_property
    def is_plain(self) -> bool:
        return not self.other_forms and not self.keys.that_matter


@functools.lru_cache(maxsize=4000)
def dialogue_plan(keys: tuple[str, ...]) -> RecordPlan:
    return _plan_of_dialogue(keys, _DIALECTS)


@functools.lru_cache(maxsize=4000)
def prompt_plan(keys: tuple[str, ...]) -> RecordPlan:
    return _plan_of_dialogue(keys, _PROMPT_DIALECTS)


def _plan_of_dialogue(keys: tuple[str, ...], dialects: Sequence[_Dialect]) -> RecordPlan:
    if any(key in keys for key in _PREFERENCE_KEYS):
        raise Unusable(
            "preference pair",
            f"has {quoted(keys)}; reward_modeling.py and dpo_training.py read such pairs",
        )
    if "text" in keys and not any(all(key in keys for key in dialect.required) for dialect in dialects):
        raise Unusable("plain text", f"has {quoted(keys)}; pretraining.py reads text without dialogue")
    return _find_plan(keys, dialects)


@functools.lru_cache(maxsize=4000)
def pair_plan(keys: tuple[str, ...]) -> RecordPlan:
    if not any(key in keys for key in _PREFERENCE_KEYS):
        raise Unusable(
            "no pair",
            f"has {quoted(keys)}; a pair has a question with 'response_chosen' and 'response_rejected' "
            "(scripts/generate_preference_data.py makes pairs of dialogues)",
        )
    return _find_plan(keys, _PAIR_DIALECTS)


@functools.lru_cache(maxsize=4000)
def is_read_whole(keys: tuple[str, ...], kind: Literal["dialogues", "pairs"]) -> bool:
    """Whether a dialect has these keys, prompt and all."""
    try:
        (dialogue_plan if kind == "dialogues" else pair_plan)(keys)
    except Unusable:
        return False
    return kind == "dialogues" or not lacks_prompt(keys)


def has_dialect(keys: tuple[str, ...], kind: Literal["dialogues", "pairs"]) -> bool:
    """Whether records with these keys are read here, if only to be refused as records of another kind."""
    try:
        (dialogue_plan if kind == "dialogues" else pair_plan)(keys)
    except Unusable as error:
        return error.reason not in ("unknown keys", "no pair")
    return True


@functools.lru_cache(maxsize=4000)
def lacks_prompt(keys: tuple[str, ...]) -> bool:
    """Whether pairs with these keys are read as two whole conversations."""
    try:
        return pair_plan(keys).dialect is _PAIR_DIALECTS[-1]
    except Unusable:
        return False


def _find_plan(keys: tuple[str, ...], dialects: Sequence[_Dialect]) -> RecordPlan:
    every_key = tuple({key: None for dialect in dialects for key in dialect.required + dialect.optional})
    for dialect in dialects:
        if all(key in keys for key in dialect.required):
            read = dialect.required + dialect.optional
            other_forms = _other_forms([key for key in keys if key not in read], dialect, every_key)
            suspect = suspects(keys, keys, dialect.optional)
            return RecordPlan(dialect, other_forms, sort_keys(keys, (*read, *other_forms)), suspect)
    known = ", or ".join(" with ".join(map(repr, d.required)) for d in dialects)
    advice = nearest([key for key in keys if not is_harmless(key)], every_key)
    if not advice and dialects is _DIALECTS and {*keys}.isdisjoint(ANSWERS) and _is_prompt(keys):
        advice = "; there is no reply to it: add one, or let a model answer by inference.py --data_file"
    elif not advice and keys:
        advice = "; scripts/convert_data_format.py reads more forms"
    raise Unusable("unknown keys", f"has {quoted(keys)}; known are {known}{advice}")


def _is_prompt(keys: Collection[str]) -> bool:
    return any(key in keys for key in ("question", "prompt", "instruction"))


def _other_forms(rest: Sequence[str], dialect: _Dialect, every_key: Sequence[str]) -> tuple[str, ...]:
    """The keys by which other forms say what is asked and replied; a lone answer beside turns is to compare with."""
    names = {key: key.strip().lower() for key in rest}
    every_key = {*every_key, "conversation"}
    if dialect.has_turns:
        is_whole = not {"question", "instruction"}.isdisjoint(names.values())
        every_key -= set() if is_whole else {"answer", "output"}
    elif all(not set(side).isdisjoint(names.values()) for side in ((*QUESTIONS, *THOUGHTS), ANSWERS)):
        every_key |= {*QUESTIONS, *ANSWERS}
    return tuple(key for key in rest if names[key] in every_key)


def planned(record: dict, plan_of: Callable[[tuple[str, ...]], RecordPlan], reading: Reading) -> tuple:
    """The record without the keys that count as absent, and its plan."""
    present = with_values(record)
    try:
        plan = plan_of(tuple(present))
    except Unusable:
        if len(present) == len(record):
            raise
        present = record  # it then says which text is null or empty
        plan = plan_of(tuple(record))
    # A misspelt 'history' taken for metadata would train on answers without their questions.
    suspect = plan.suspect if present is record else suspects(tuple(record), tuple(present), plan.dialect.optional)
    if suspect:
        raise Unusable("unknown keys", f"has {quoted(record)}{suspect}")
    return present, plan


def check_other_forms(record: dict, plan: RecordPlan, texts: Sequence[str], reading: Reading) -> None:
    """Raise Unusable where a key of another form says what is not in the turns; a copy of them does no harm."""
    read = "\n".join(texts)
    others = [key for key in plan.other_forms if any(text not in read for text in _words_in(record[key]))]
    if others:
        required = plan.dialect.required
        ways = [reading.ignoring(*others, *plan.keys.thoughts)]
        dialects = _PAIR_DIALECTS if plan.dialect in _PAIR_DIALECTS else _DIALECTS
        for ignored in ((*required, *plan.keys.options), required[-1:]):
            left = [key for key in record if key not in ignored]
            if len(ways) == 1 and _is_form([key.strip().lower() for key in left], dialects):
                is_flag = reading.ignore_keys is not None and reading.role_map is None
                by_converter = is_flag and not any(set(dialect.required) <= set(left) for dialect in dialects)
                tool = "scripts/convert_data_format.py " if by_converter else ""
                ways.append(f"{tool}{reading.ignoring(*ignored)}")
        needed = " with ".join(map(repr, required))
        raise Unusable(
            "two forms", f"has {needed}, and {', '.join(map(repr, others))} with other words; {'; '.join(ways)}"
        )


def _is_form(keys: Collection[str], dialects: Sequence[_Dialect]) -> bool:
    """Whether keys in lower case are those of a form that is read or converted."""
    whole = any(set(dialect.required) <= set(keys) for dialect in dialects)
    return whole or (dialects is _DIALECTS and not {*QUESTIONS}.isdisjoint(keys) and not {*ANSWERS}.isdisjoint(keys))


def _words_in(value: object) -> Iterator[str]:
    """The texts of a value: cells, exchanges, and what turns say."""
    if isinstance(value, str):
        with suppress(Unusable):  # words in brackets
            value = parsed(value, "") if NESTED.match(value) else value
    if isinstance(value, str):
        yield stripped(value.replace("\r\n", "\n"))
    if isinstance(value, dict):
        value = [item for key, item in value.items() if key not in (*NAME_KEYS, "type")]
    if isinstance(value, list):
        for item in value:
            yield from _words_in(item)


def with_options(turns: list[dict], record: dict, plan: RecordPlan, reading: Reading) -> list[dict]:
    """The turns with the options in the question, where they do not stand there already."""
    options = _options_of(record, plan.keys.options)
    read = "\n".join(turn["content"] for turn in turns)
    asks = [index for index, turn in enumerate(turns) if turn["role"] == "user"]
    if not asks or all(text in read for text in options.values()):
        return turns
    if plan.dialect.has_turns:
        keys = ", ".join(map(repr, plan.keys.options))
        raise Unusable(
            "options apart",
            f"has {keys}, which no turn says; write them into the question, or {reading.ignoring(*plan.keys.options)}",
        )
    asked = asks[-1]
    lines = [turns[asked]["content"], *(f"{letter}. {text}" for letter, text in options.items())]
    return [*turns[:asked], {"role": "user", "content": "\n".join(lines)}, *turns[asked + 1 :]]


def _options_of(record: dict, keys: Sequence[str]) -> dict[str, str]:
    """Letter and text of each option, from any of the forms that exams are published in."""
    by_letter = {letter_of(key): record[key] for key in sorted(keys, key=letter_of) if letter_of(key)}
    value = given = by_letter or first_of(record, keys) or []
    if isinstance(value, str):
        value = parsed(value, "'options'") if NESTED.match(value) else list(filter(None, value.splitlines()))
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        matches = list(filter(None, map(_OPTION_LINE.match, value)))
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
        raise Unusable("broken options", f"the options are {given!r:.80}; they must be letters and texts")
    return {letter: stripped(str(text)) for letter, text in options.items()}


def _letter_and_text(letter: str, option: object) -> tuple[str, object]:
    """Of an item of a list of options: a text, or an object that says both; `letter` where it does not say one."""
    if not isinstance(option, dict):
        return letter, option
    if len(option) == 1 and letter_of(next(iter(option))):
        return next(iter(option.items()))
    text = first_of(option, ("value", "text", "content"))
    return str(first_of(option, ("key", "label", "id", "letter")) or letter), option if text is None else text


def first_of(row: dict, keys: Sequence[str]) -> object:
    return next((row[key] for key in keys if not is_empty(row.get(key))), None)


_OPTION_LINE = re.compile(r"\s*(?:[(（]([A-Za-z])[)）]|([A-Za-z])(?:\s*[.:：、)）．]|\s))\s*")


# ------------------------------------------------------------------------------ pairs


def _pair_of_replies(
    chosen_key: str,
    rejected_key: str,
    prompt: Callable[[dict, Reading], list[dict]],
    record: dict,
    reading: Reading,
) -> tuple:
    """The prompt's turns, and two replies that are texts, turns, or conversations which hold the prompt too."""
    turns = prompt(record, reading)
    chosen = _reply(record[chosen_key], f"'{chosen_key}'", reading)
    rejected = _reply(record[rejected_key], f"'{rejected_key}'", reading)
    if turns and turns[-1] == chosen[-1]:  # the dialogue with its reply
        turns = turns[:-1]
    if len(chosen) == len(rejected) == 1:
        _check_chosen(chosen[0])
        return turns, chosen[0]["content"], rejected[0]["content"]
    whole, *replies = _split_conversations(chosen, rejected)
    said = [(turn["role"], turn["content"]) for turn in whole]
    absent = [turn for turn in turns if (turn["role"], turn["content"]) not in said]
    system = [turn for turn in absent if turn["role"] == "system" != whole[0]["role"]]
    if not turns or absent != system:
        raise Unusable(
            "two prompts", f"the prompt is not in '{chosen_key}', which holds turns before its reply; keep one of them"
        )
    return [*system, *whole], *replies


def _reply(value: object, where: str, reading: Reading) -> list[dict]:
    """One assistant's turn, or a conversation that ends with one."""
    if isinstance(value, str) and ("{" not in value or not _TURNS_IN_A_CELL.match(value)):
        return turns_of_transcript(value) or [{"role": "assistant", "content": text_of(value, where)}]
    value = parsed(value, where)
    if isinstance(value, list | dict) and value and not is_parts(value):
        turns = value if isinstance(value, list) else [value]
        turns = _read_turns(turns, reading, f" of {where}")
        last = turns[-1]
        if last["role"] != "assistant":
            raise Unusable("not a reply", f"{where} is from the {last['role']}; it must be the assistant's words")
        if last.get("tool_calls"):
            raise Unusable("not a reply", f"{where} calls a tool; it must be the assistant's words")
        return turns
    return [{"role": "assistant", "content": text_of(value, where)}]


def _split_conversations(chosen: list[dict], rejected: list[dict]) -> tuple:
    """The turns that two conversations share, and the replies in which they differ."""
    if not chosen or not rejected:
        raise Unusable("empty conversation", "'chosen' or 'rejected' has no turns; delete the record")
    if chosen[:-1] != rejected[:-1]:
        raise Unusable(
            "two prompts", "'chosen' and 'rejected' differ before their last turn; they must share the prompt"
        )
    for key, turns in (("chosen", chosen), ("rejected", rejected)):
        if turns[-1]["role"] != "assistant" or turns[-1].get("tool_calls"):
            raise Unusable("no reply", f"'{key}' ends with the {turns[-1]['role']}; it must end with a reply")
    _check_chosen(chosen[-1])
    return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]


def _check_chosen(reply: dict) -> None:
    if "weight" in reply:
        raise Unusable("not to be learned", "the chosen reply is marked as a bad one; delete the record or the mark")


def _pair_of_conversations(chosen_key: str, rejected_key: str, record: dict, reading: Reading) -> tuple:
    """TRL's pair without a prompt: two conversations that differ in the last reply."""
    for key in (chosen_key, rejected_key):
        value = record[key]
        if isinstance(value, str) and not NESTED.match(value) and not turns_of_transcript(value):
            raise Unusable(
                "no prompt",
                f"'{key}' is a reply without its question; add it as 'question', or write whole conversations",
            )
    return _split_conversations(*(_turns_of_list(key, record, reading) for key in (chosen_key, rejected_key)))


def _pair_beside_dialogue(key: str, rejected_key: str, record: dict, reading: Reading) -> tuple:
    """A dialogue, whose last reply is the chosen one, and the rejected reply or the dialogue that ends in it."""
    turns = _turns_of_list(key, record, reading)
    rejected = _reply(record[rejected_key], f"'{rejected_key}'", reading)
    return _split_conversations(turns, rejected if len(rejected) > 1 else [*turns[:-1], *rejected])


_PROMPT_OF_TRL = functools.partial(_prompt_of_text, "prompt")
_PROMPT_DIALECTS = (
    *_PROMPT_DIALECTS,
    _Dialect(("prompt",), ("history", *ASIDE), _PROMPT_OF_TRL),
)
SCORES = ("margin", "score_chosen", "score_rejected")
_PAIR_OPTIONAL = (*ASIDE, *SCORES)


def _replies_to(prompt_key: str, chosen_key: str, rejected_key: str, prompt: Callable, *optional: str) -> _Dialect:
    read = functools.partial(_pair_of_replies, chosen_key, rejected_key, prompt)
    return _Dialect((prompt_key, chosen_key, rejected_key), (*optional, *_PAIR_OPTIONAL), read)


_PROMPT_OF_QUESTION = functools.partial(_prompt_of_text, "question")
_PAIR_DIALECTS = (
    _replies_to("question", "response_chosen", "response_rejected", _PROMPT_OF_QUESTION, "history"),
    _replies_to("question", "good_answer", "bad_answer", _PROMPT_OF_QUESTION, "history"),
    _replies_to("prompt", "chosen", "rejected", _PROMPT_OF_TRL, "history"),
    *(_replies_to(key, "chosen", "rejected", functools.partial(_turns_of_list, key)) for key in _LISTS),
    _replies_to("instruction", "chosen", "rejected", _prompt_of_alpaca, "input", "history"),
    _replies_to("question", "chosen", "rejected", _PROMPT_OF_QUESTION, "history"),
    *(
        _Dialect((key, rejected), _PAIR_OPTIONAL, functools.partial(_pair_beside_dialogue, key, rejected))
        for key in _LISTS
        for rejected in ("rejected_response", "rejected_messages")
    ),
    _Dialect(
        ("chosen", "rejected"),
        _PAIR_OPTIONAL,
        functools.partial(_pair_of_conversations, "chosen", "rejected"),
    ),
)
KEYS_READ = frozenset(
    key for dialect in (*_PROMPT_DIALECTS, *_PAIR_DIALECTS) for key in dialect.required + dialect.optional
)
