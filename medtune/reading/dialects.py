"""The dialects of records: which form one has, by its keys alone, and how it becomes turns.

A turn is a message as records.Dialogue holds it. Whoever cannot be read raises Unusable.
"""

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from medtune.errors import Unusable
from medtune.reading.keys import THOUGHTS, KeyPlan, Reading, is_harmless, sort_keys
from medtune.reading.turns import (
    TURNS_IN_A_CELL,
    asking_turns,
    read_history,
    read_turns,
    turns_in,
    turns_of_list,
    turns_of_transcript,
)
from medtune.reading.values import (
    NAME_KEYS,
    NESTED,
    is_parts,
    nearest,
    optional_text,
    parse_nested,
    quoted,
    strip_blanks,
    suspects,
    text_of,
    with_values,
)

# What records are read as.
Form = Literal["dialogues", "feedback", "prompts", "pairs"]

# ---------------------------------------------------------------- dialogues


def _prompt_of_alpaca(record: dict, reading: Reading) -> list[dict]:
    """The instruction, and the input it is about on the next line."""
    instruction, about = text_of(record["instruction"], "'instruction'"), optional_text(record, "input")
    question = f"{instruction}\n{about}" if instruction and about else instruction or about
    return [*read_history(record, reading), *asking_turns(question, "'instruction'")]


def _prompt_of_text(key: str, record: dict, reading: Reading) -> list[dict]:
    """What is asked as a text or as turns, after the history."""
    where = f"'{key}'"
    turns = turns_in(record[key], where, reading) or asking_turns(text_of(record[key], where), where)
    return [*read_history(record, reading), *turns]


_PROMPT_OF_QUESTION = functools.partial(_prompt_of_text, "question")
_PROMPT_OF_TRL = functools.partial(_prompt_of_text, "prompt")


def _exchange(
    prompt: Callable[[dict, Reading], list[dict]], reply_key: str, record: dict, reading: Reading
) -> list[dict]:
    where = f"'{reply_key}'"
    asked = prompt(record, reading)
    reply = turns_in(record[reply_key], where, reading)
    return asked + (reply or [{"role": "assistant", "content": text_of(record[reply_key], where)}])


# ---------------------------------------------------------------- pairs


def _pair_of_replies(
    prompt: Callable[[dict, Reading], list[dict]], chosen_key: str, rejected_key: str, record: dict, reading: Reading
) -> tuple:
    """The prompt's turns and the two replies, of which each is a text, a turn, or a conversation with the prompt."""
    turns = prompt(record, reading)
    chosen, rejected = (_reply(key, record, reading) for key in (chosen_key, rejected_key))
    if turns and turns[-1] == chosen[-1]:  # the dialogue with its reply
        turns = turns[:-1]
    if len(chosen) == len(rejected) == 1:
        _check_chosen(chosen[0])
        return turns, chosen[0]["content"], rejected[0]["content"]
    whole, *replies = _split_conversations(chosen, rejected)
    contained = [(turn["role"], turn["content"]) for turn in whole]
    absent = [turn for turn in turns if (turn["role"], turn["content"]) not in contained]
    system = [turn for turn in absent if turn["role"] == "system" != whole[0]["role"]]
    if not turns or absent != system:
        raise Unusable(
            "two prompts", f"the prompt is not in '{chosen_key}', which holds turns before its reply; keep one of them"
        )
    return [*system, *whole], *replies


def _reply(key: str, record: dict, reading: Reading) -> list[dict]:
    """One assistant's turn, or a conversation that ends with one."""
    value, where = record[key], f"'{key}'"
    if isinstance(value, str) and ("{" not in value or not TURNS_IN_A_CELL.match(value)):
        return turns_of_transcript(value) or [{"role": "assistant", "content": text_of(value, where)}]
    value = parse_nested(value, where)
    if not isinstance(value, list | dict) or not value or is_parts(value):
        return [{"role": "assistant", "content": text_of(value, where)}]
    turns = read_turns(value if isinstance(value, list) else [value], reading, f" of {where}")
    last = turns[-1]
    if last["role"] != "assistant":
        raise Unusable("not a reply", f"{where} is from the {last['role']}; it must be the assistant's words")
    if last.get("tool_calls"):
        raise Unusable("not a reply", f"{where} calls a tool; it must be the assistant's words")
    return turns


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


def _pair_of_conversations(record: dict, reading: Reading) -> tuple:
    """TRL's pair without a prompt: two conversations that differ in the last reply."""
    for key in ("chosen", "rejected"):
        value = record[key]
        if isinstance(value, str) and not NESTED.match(value) and not turns_of_transcript(value):
            raise Unusable(
                "no prompt",
                f"'{key}' is a reply without its question; add it as 'question', or write whole conversations",
            )
    return _split_conversations(*(turns_of_list(key, record, reading) for key in ("chosen", "rejected")))


def _pair_beside_dialogue(key: str, rejected_key: str, record: dict, reading: Reading) -> tuple:
    """A dialogue, whose last reply is the chosen one, and a rejected reply, which may be a whole dialogue."""
    turns = turns_of_list(key, record, reading)
    rejected = _reply(rejected_key, record, reading)
    return _split_conversations(turns, rejected if len(rejected) > 1 else [*turns[:-1], *rejected])


# ---------------------------------------------------------------- the tables


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
SCORES = ("margin", "score_chosen", "score_rejected")
_TEXT, _ALPACA = ("history", *ASIDE), ("input", "history", *ASIDE)

# Columns of published data, in lower case.
QUESTIONS = (
    "question", "questions", "query", "prompt", "instruction", "input", "inputs", "problem", "问题", "提问", "指令",
    "输入",
)  # fmt: skip
ANSWERS = (
    "answer", "answers", "response", "output", "completion", "reply", "target", "targets", "回答", "答案", "回复",
    "输出",
)  # fmt: skip


def _list(key: str) -> _Dialect:
    return _Dialect((key,), ASIDE, functools.partial(turns_of_list, key))


# The one rule of detection: the first dialect whose required keys the record has, whatever the file's name.
# A key that is null or empty (an empty csv cell) counts as absent. keys.py defines the meaning of other keys.
_DIALECTS = (
    *map(_list, _LISTS),
    _Dialect(("instruction", "output"), _ALPACA, functools.partial(_exchange, _prompt_of_alpaca, "output")),
    _Dialect(("question", "answer"), _TEXT, functools.partial(_exchange, _PROMPT_OF_QUESTION, "answer")),
)


def _replies_to(prompt_key: str, chosen_key: str, rejected_key: str, prompt: Callable, *optional: str) -> _Dialect:
    read = functools.partial(_pair_of_replies, prompt, chosen_key, rejected_key)
    return _Dialect((prompt_key, chosen_key, rejected_key), (*optional, *ASIDE, *SCORES), read)


def _beside_dialogue(key: str, rejected_key: str) -> _Dialect:
    read = functools.partial(_pair_beside_dialogue, key, rejected_key)
    return _Dialect((key, rejected_key), (*ASIDE, *SCORES), read)


_WITHOUT_PROMPT = _Dialect(("chosen", "rejected"), (*ASIDE, *SCORES), _pair_of_conversations)
_PAIR_DIALECTS = (
    _replies_to("question", "response_chosen", "response_rejected", _PROMPT_OF_QUESTION, "history"),
    _replies_to("question", "good_answer", "bad_answer", _PROMPT_OF_QUESTION, "history"),
    _replies_to("prompt", "chosen", "rejected", _PROMPT_OF_TRL, "history"),
    *(_replies_to(key, "chosen", "rejected", functools.partial(turns_of_list, key)) for key in _LISTS),
    _replies_to("instruction", "chosen", "rejected", _prompt_of_alpaca, "input", "history"),
    _replies_to("question", "chosen", "rejected", _PROMPT_OF_QUESTION, "history"),
    *(_beside_dialogue(key, rejected) for key in _LISTS for rejected in ("rejected_response", "rejected_messages")),
    _WITHOUT_PROMPT,
)
_PREFERENCE_KEYS = (
    "response_chosen", "response_rejected", "chosen", "rejected", "good_answer", "bad_answer", "rejected_response",
    "rejected_messages",
)  # fmt: skip

_BY_FORM: dict[Form, tuple[_Dialect, ...]] = {
    "dialogues": _DIALECTS,
    "pairs": _PAIR_DIALECTS,
    "feedback": (
        *_DIALECTS,
        _Dialect(("prompt", "completion"), _TEXT, functools.partial(_exchange, _PROMPT_OF_TRL, "completion")),
    ),
    # What is to be answered may come without a reply, and a text for pretraining without a question.
    "prompts": (
        *_DIALECTS,
        _list("conversation"),
        _Dialect(("instruction",), _ALPACA, _prompt_of_alpaca),
        _Dialect(("question",), _TEXT, _PROMPT_OF_QUESTION),
        _Dialect(("prompt",), _TEXT, _PROMPT_OF_TRL),
    ),
}
KEYS_READ = frozenset(
    key for form in ("prompts", "pairs") for dialect in _BY_FORM[form] for key in dialect.required + dialect.optional
)

# ---------------------------------------------------------------- which dialect a record has


@dataclass(frozen=True)
class RecordPlan:
    """How to read records with these keys: their dialect, keys of other dialects, and what the other keys mean."""

    dialect: _Dialect
    other_forms: tuple[str, ...]
    keys: KeyPlan
    suspect: str  # what keys that are not read may be meant as

    @functools.cached_property
    def is_plain(self) -> bool:
        return not self.other_forms and not self.keys.that_matter


def is_pair(keys: Collection[str]) -> bool:
    """Whether one of the keys holds a reply that is better or worse than another."""
    return any(key in keys for key in _PREFERENCE_KEYS)


@functools.lru_cache(maxsize=16000)
def _plan_of(keys: tuple[str, ...], form: Form) -> RecordPlan:
    dialects = _BY_FORM[form]
    if is_pair(keys) and form != "pairs":
        raise Unusable("preference pair", f"has {quoted(keys)}; reward_modeling.py and dpo_training.py read such pairs")
    if form == "pairs" and not is_pair(keys):
        raise Unusable(
            "no pair",
            f"has {quoted(keys)}; a pair has a question with 'response_chosen' and 'response_rejected' "
            "(scripts/generate_preference_data.py makes pairs of dialogues)",
        )
    every_key = tuple({key: None for dialect in dialects for key in dialect.required + dialect.optional})
    for dialect in dialects:
        if all(key in keys for key in dialect.required):
            read = dialect.required + dialect.optional
            other_forms = _other_forms([key for key in keys if key not in read], dialect, every_key)
            suspect = suspects(keys, keys, dialect.optional)
            return RecordPlan(dialect, other_forms, sort_keys(keys, (*read, *other_forms)), suspect)
    if "text" in keys and form != "pairs":
        raise Unusable("plain text", f"has {quoted(keys)}; pretraining.py reads text without dialogue")
    known = ", or ".join(" with ".join(map(repr, d.required)) for d in dialects)
    advice = nearest([key for key in keys if not is_harmless(key)], every_key)
    is_prompt = any(key in keys for key in ("question", "prompt", "instruction"))
    if not advice and form == "dialogues" and {*keys}.isdisjoint(ANSWERS) and is_prompt:
        advice = "; there is no reply to it: add one, or let a model answer by inference.py --data_file"
    elif not advice and keys:
        advice = "; scripts/convert_data_format.py reads more forms"
    raise Unusable("unknown keys", f"has {quoted(keys)}; known are {known}{advice}")


@functools.lru_cache(maxsize=4000)  # `_plan_of` keeps no refusals
def is_read_whole(keys: tuple[str, ...], form: Form) -> bool:
    """Whether a dialect has these keys, prompt and all."""
    with suppress(Unusable):
        return _plan_of(keys, form).dialect is not _WITHOUT_PROMPT
    return False


def has_dialect(keys: tuple[str, ...], form: Form) -> bool:
    """Whether this module knows records with these keys, including those it refuses as another kind."""
    try:
        _plan_of(keys, form)
    except Unusable as error:
        return error.reason not in ("unknown keys", "no pair")
    return True


def lacks_prompt(keys: tuple[str, ...]) -> bool:
    """Whether pairs with these keys are read as two whole conversations."""
    with suppress(Unusable):
        return _plan_of(keys, "pairs").dialect is _WITHOUT_PROMPT
    return False


def _other_forms(rest: Sequence[str], dialect: _Dialect, every_key: Sequence[str]) -> tuple[str, ...]:
    """The keys that hold question and reply in other dialects. A lone answer beside turns is only a reference."""
    names = {key: key.strip().lower() for key in rest}
    every_key = {*every_key, "conversation"}
    if dialect.has_turns:
        is_whole = not {"question", "instruction"}.isdisjoint(names.values())
        every_key -= set() if is_whole else {"answer", "output"}
    elif all(not set(side).isdisjoint(names.values()) for side in ((*QUESTIONS, *THOUGHTS), ANSWERS)):
        every_key |= {*QUESTIONS, *ANSWERS}
    return tuple(key for key in rest if names[key] in every_key)


def plan_record(record: dict, form: Form) -> tuple[dict, RecordPlan]:
    """The record without the keys that count as absent, and its plan."""
    present = with_values(record)
    try:
        plan = _plan_of(tuple(present), form)
    except Unusable:
        if len(present) == len(record):
            raise
        present = record  # it then says which text is null or empty
        plan = _plan_of(tuple(record), form)
    # A misspelt 'history' taken for metadata would train on answers without their questions.
    suspect = plan.suspect if present is record else suspects(tuple(record), tuple(present), plan.dialect.optional)
    if suspect:
        raise Unusable("unknown keys", f"has {quoted(record)}{suspect}")
    return present, plan


def check_other_forms(record: dict, plan: RecordPlan, texts: Sequence[str], reading: Reading) -> None:
    """Raise Unusable if a key of another dialect holds text that is not in the turns. Copies do no harm."""
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
    """All texts in a value: cells, exchanges and the contents of turns."""
    if isinstance(value, str):
        with suppress(Unusable):  # words in brackets
            value = parse_nested(value, "") if NESTED.match(value) else value
    if isinstance(value, str):
        yield strip_blanks(value.replace("\r\n", "\n"))
    if isinstance(value, dict):
        value = [item for key, item in value.items() if key not in (*NAME_KEYS, "type")]
    if isinstance(value, list):
        for item in value:
            yield from _words_in(item)
