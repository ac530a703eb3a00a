"""The dialects of records: which form one has, by its keys alone, and how it becomes turns.

    present, plan = plan_record(record, dialogue_plan)
    turns = plan.dialect.read(present, Reading())

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


def _turns_of_alpaca(record: dict, reading: Reading) -> list[dict]:
    """Read an instruction, the input it is about on the next line, and the output."""
    return [*_prompt_of_alpaca(record, reading), *_reply_turns("output", record, reading)]


def _prompt_of_alpaca(record: dict, reading: Reading) -> list[dict]:
    instruction, about = text_of(record["instruction"], "'instruction'"), optional_text(record, "input")
    question = f"{instruction}\n{about}" if instruction and about else instruction or about
    return [*read_history(record, reading), *asking_turns(question, "'instruction'")]


def _turns_of_question(record: dict, reading: Reading) -> list[dict]:
    return [*_prompt_of_text("question", record, reading), *_reply_turns("answer", record, reading)]


def _turns_of_completion(record: dict, reading: Reading) -> list[dict]:
    return [*_prompt_of_text("prompt", record, reading), *_reply_turns("completion", record, reading)]


def _prompt_of_text(key: str, record: dict, reading: Reading) -> list[dict]:
    """What is asked as a text or as turns, after the history."""
    where = f"'{key}'"
    turns = turns_in(record[key], where, reading) or asking_turns(text_of(record[key], where), where)
    return [*read_history(record, reading), *turns]


def _reply_turns(key: str, record: dict, reading: Reading) -> list[dict]:
    where = f"'{key}'"
    turns = turns_in(record[key], where, reading)
    return turns or [{"role": "assistant", "content": text_of(record[key], where)}]


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
# A key that is null or empty (an empty csv cell) counts as absent. keys.py defines the meaning of other keys.
_DIALECTS = (
    *(_Dialect((key,), ASIDE, functools.partial(turns_of_list, key)) for key in _LISTS),
    _Dialect(("instruction", "output"), ("input", "history", *ASIDE), _turns_of_alpaca),
    _Dialect(("question", "answer"), ("history", *ASIDE), _turns_of_question),
)


# Feedback may also have TRL's form.
_FEEDBACK_DIALECTS = (*_DIALECTS, _Dialect(("prompt", "completion"), ("history", *ASIDE), _turns_of_completion))
# What is to be answered may also come without a reply, and a text for pretraining without a question.
_PROMPT_DIALECTS = (
    *_DIALECTS,
    _Dialect(("conversation",), ASIDE, functools.partial(turns_of_list, "conversation")),
    _Dialect(("instruction",), ("input", "history", *ASIDE), _prompt_of_alpaca),
    _Dialect(("question",), ("history", *ASIDE), functools.partial(_prompt_of_text, "question")),
)


_PREFERENCE_KEYS = (
    "response_chosen", "response_rejected", "chosen", "rejected", "good_answer", "bad_answer", "rejected_response",
    "rejected_messages",
)  # fmt: skip


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


@functools.lru_cache(maxsize=4000)
def dialogue_plan(keys: tuple[str, ...]) -> RecordPlan:
    return _plan_of_dialogue(keys, _DIALECTS)


@functools.lru_cache(maxsize=4000)
def feedback_plan(keys: tuple[str, ...]) -> RecordPlan:
    return _plan_of_dialogue(keys, _FEEDBACK_DIALECTS)


@functools.lru_cache(maxsize=4000)
def prompt_plan(keys: tuple[str, ...]) -> RecordPlan:
    return _plan_of_dialogue(keys, _PROMPT_DIALECTS)


def is_pair(keys: Collection[str]) -> bool:
    """Whether one of the keys holds a reply that is better or worse than another."""
    return any(key in keys for key in _PREFERENCE_KEYS)


def _plan_of_dialogue(keys: tuple[str, ...], dialects: Sequence[_Dialect]) -> RecordPlan:
    if is_pair(keys):
        raise Unusable(
            "preference pair",
            f"has {quoted(keys)}; reward_modeling.py and dpo_training.py read such pairs",
        )
    if "text" in keys and not any(all(key in keys for key in dialect.required) for dialect in dialects):
        raise Unusable("plain text", f"has {quoted(keys)}; pretraining.py reads text without dialogue")
    return _find_plan(keys, dialects)


@functools.lru_cache(maxsize=4000)
def pair_plan(keys: tuple[str, ...]) -> RecordPlan:
    if not is_pair(keys):
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
    """Whether this module knows records with these keys, including those it refuses as another kind."""
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
    """The keys that hold question and reply in other dialects. A lone answer beside turns is only a reference."""
    names = {key: key.strip().lower() for key in rest}
    every_key = {*every_key, "conversation"}
    if dialect.has_turns:
        is_whole = not {"question", "instruction"}.isdisjoint(names.values())
        every_key -= set() if is_whole else {"answer", "output"}
    elif all(not set(side).isdisjoint(names.values()) for side in ((*QUESTIONS, *THOUGHTS), ANSWERS)):
        every_key |= {*QUESTIONS, *ANSWERS}
    return tuple(key for key in rest if names[key] in every_key)


def plan_record(record: dict, plan_of: Callable[[tuple[str, ...]], RecordPlan]) -> tuple:
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


def _pair_of_replies(
    chosen_key: str,
    rejected_key: str,
    prompt: Callable[[dict, Reading], list[dict]],
    record: dict,
    reading: Reading,
) -> tuple:
    """The prompt's turns and the two replies.

    Each reply is a text, a turn, or a conversation that repeats the prompt.
    """
    turns = prompt(record, reading)
    chosen = _reply(record[chosen_key], f"'{chosen_key}'", reading)
    rejected = _reply(record[rejected_key], f"'{rejected_key}'", reading)
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


def _reply(value: object, where: str, reading: Reading) -> list[dict]:
    """One assistant's turn, or a conversation that ends with one."""
    if isinstance(value, str) and ("{" not in value or not TURNS_IN_A_CELL.match(value)):
        return turns_of_transcript(value) or [{"role": "assistant", "content": text_of(value, where)}]
    value = parse_nested(value, where)
    if isinstance(value, list | dict) and value and not is_parts(value):
        turns = value if isinstance(value, list) else [value]
        turns = read_turns(turns, reading, f" of {where}")
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
    return _split_conversations(*(turns_of_list(key, record, reading) for key in (chosen_key, rejected_key)))


def _pair_beside_dialogue(key: str, rejected_key: str, record: dict, reading: Reading) -> tuple:
    """A pair from a dialogue and a rejected reply.

    The dialogue's last reply is the chosen one; the rejected one may come as a whole dialogue.
    """
    turns = turns_of_list(key, record, reading)
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
    *(_replies_to(key, "chosen", "rejected", functools.partial(turns_of_list, key)) for key in _LISTS),
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
