"""Read the turns of a dialogue: lists of turns, transcripts, and exchanges with both sides in one object."""

import functools
import itertools
import re
from dataclasses import dataclass

from medtune.errors import Unusable
from medtune.reading.keys import (
    KeyPlan,
    Reading,
    check_prompt_keys,
    check_reply_keys,
    reply_with_thought,
    sort_keys,
)
from medtune.reading.values import (
    NAME_KEYS,
    NO_TEXT,
    is_empty,
    is_turns,
    kind_of,
    nearest,
    optional_text,
    parse_nested,
    quoted,
    strip_blanks,
    text_of,
)

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
    """The role for a speaker's name (case and outer blanks ignored); "tool call" is one too."""
    role = None
    if isinstance(name, str | int):
        role = (reading.role_map or {}).get(str(name).strip()) or ROLES.get(str(name).strip().lower())
    if role is None:
        script = "" if reading.role_map is not None else "scripts/convert_data_format.py "
        advice = f"; {script}--role_map {name}=user says who it is" if isinstance(name, str | int) else ""
        raise Unusable("unknown role", f"{where} is from {name!r}; known are {', '.join(ROLES)}{advice}")
    return role


def turns_of_list(key: str, record: dict, reading: Reading) -> list[dict]:
    """Read ShareGPT's `conversations` and OpenAI's `messages`; either list may hold either form of turn."""
    value = record[key]
    if isinstance(value, str) and (turns := turns_of_transcript(value)):
        return turns
    turns = parse_nested(value, f"'{key}'")
    if isinstance(turns, dict):  # one exchange, or columns of a struct, as `datasets` holds a list of objects
        form = _turn_form(tuple(turns))
        columns = [column for column in turns.values() if isinstance(column, list)]
        if form.name and len(columns) == len(turns):
            turns = [dict(zip(turns, row, strict=False)) for row in zip(*columns, strict=False)]
        elif form.sides:
            turns = [turns]
    if not isinstance(turns, list):
        raise Unusable("not a list", f"'{key}' is {kind_of(turns)}; it must be a list of turns")
    return read_turns(turns, reading)


def read_turns(turns: list, reading: Reading, of: str = "") -> list[dict]:
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
    """The keys of a turn: speaker and content, or both sides of an exchange; and the meaning of the others."""

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
        read = (name, content, "tool_calls", "function_call")
        read += ("from", "role", "value", "content") if content else ()
        plan = sort_keys(keys, read)
        is_plain = bool(content) and not set(keys) & set(read) - {name, content} and not plan.that_matter + plan.unknown
        return _TurnForm(name, content, None, plan, is_plain)
    for sides in _SIDES:
        if all(side in keys for side in sides):
            return _TurnForm("", "", sides, sort_keys(keys, ("system", *sides)))
    return _TurnForm("", "", None, sort_keys(keys, keys))


def _plain_message(turn: object, reading: Reading) -> dict | None:
    """Fast path: the message of a turn that has only speaker and content; None for any other."""
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
    """Write a thought before the reply, and mark a reply that is not learned with OpenAI's `"weight": 0`."""
    if message["role"] != "assistant":
        check_prompt_keys(turn, plan, reading, where)
        return
    if check_reply_keys(turn, plan, reading, where, of_turn=True):
        message["weight"] = 0
    if message["content"] or message.get("tool_calls"):
        message["content"] = reply_with_thought(turn, plan, reading, where, message["content"])


def _exchange_of_turn(turn: dict, form: _TurnForm, where: str, reading: Reading) -> list[dict]:
    """Both sides of an exchange after its system prompt, if any; the reply alone if there is no question."""
    if others := [key for key in turn if key in _SIDE_KEYS and key not in form.sides and not is_empty(turn[key])]:
        raise Unusable("two forms", f"{where} has {quoted([*form.sides, *others])}; {reading.ignoring(*others)}")
    question, answer = (text_of(turn[side], f"{where} ('{side}')") for side in form.sides)
    reply = {"role": "assistant", "content": answer}
    if form.plan.that_matter:
        _honour_keys(reply, turn, form.plan, reading, where)
    system = optional_text(turn, "system")
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *asking_turns(question, where), reply]


def turns_of_transcript(text: str) -> list[dict] | None:
    """The turns of a transcript, in which each turn starts with its speaker; None for any other text.

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
    contents = [strip_blanks(text[start.end() : end]) for start, end in zip(starts, ends, strict=True)]
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def reads_as_turns(text: str) -> bool:
    """Whether a text in place of turns is read as turns, or refused as a broken form of them."""
    if ":" not in text and "：" not in text:
        return False
    try:
        return bool(TURNS_IN_A_CELL.match(text) or turns_of_transcript(text))
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
    calls = parse_nested(calls, f"the tool call of {where}")
    tool_calls = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = (call.get("function") or call) if isinstance(call, dict) else {}
        name = function.get("name") if isinstance(function, dict) else None
        arguments = _without_nulls(function.get("arguments")) if isinstance(function, dict) else None
        arguments = parse_nested(arguments or {}, f"the arguments of the tool call of {where}")
        if not (name and isinstance(name, str) and isinstance(arguments, dict)):
            raise Unusable("broken tool call", f"{where} needs a name and an object of arguments, found {call!r:.80}")
        tool_calls.append({"name": name, "arguments": arguments})
    return tool_calls


def tools_of(record: dict) -> list[dict] | None:
    if "tools" not in record and "functions" not in record:
        return None
    tools = record.get("tools") or record.get("functions")
    if is_empty(tools):
        return None
    tools = _without_nulls(parse_nested(tools, "'tools'")) or []
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise Unusable("broken tools", f"'tools' is {tools!r:.80}; it must be a list of objects")
    return tools or None


def _without_nulls(value: object) -> object:
    """Remove null keys from objects: in parquet every struct has the keys of all."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


# Turns as JSON, as csv and parquet hold them; a text may itself be JSON of another kind.
TURNS_IN_A_CELL = re.compile(r"""\s*\[?\s*\{\s*["'](from|role|value|content)["']\s*:""")


def turns_in(value: object, where: str, reading: Reading) -> list[dict] | None:
    """The turns of a list, or of a list as JSON text; None for any other value."""
    if isinstance(value, str):
        if "{" not in value or not TURNS_IN_A_CELL.match(value):
            return None
        value = parse_nested(value, where)
    return read_turns(value, reading, f" of {where}") if is_turns(value) else None


def read_history(record: dict, reading: Reading) -> list[dict]:
    """Read the earlier exchanges of a record, as [question, answer] or as turns."""
    if "history" not in record:
        return []
    history = record["history"]
    history = None if is_empty(history) else parse_nested(history, "'history'")
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
