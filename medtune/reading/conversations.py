"""Convert a record to a dialogue, a prompt, a pair or a document; every key is honoured or refused.

Whatever cannot be used raises `Unusable`, with the reason to count it by and what to do.
"""

import re
from collections.abc import Sequence

from medtune.errors import Unusable
from medtune.reading.dialects import Form, RecordPlan, check_other_forms, is_pair, plan_record
from medtune.reading.exam_options import with_options
from medtune.reading.exams import as_taught, to_exam
from medtune.reading.keys import (
    FEEDBACK_KEYS,
    Reading,
    check_media,
    check_reply_keys,
    feedback_of,
    is_labelled,
    refuse_thoughts,
    reply_with_thought,
    sort_keys,
)
from medtune.reading.records import Dialogue, Document, Feedback, Pair, Question
from medtune.reading.turns import tools_of
from medtune.reading.values import (
    holds_nothing,
    is_empty,
    kind_of,
    nearest,
    optional_text,
    quoted,
    text_of,
    with_values,
)


def to_document(record: object, source: str, reading: Reading | None = None) -> Document:
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
        present, plan = plan_record(record, "prompts")
        turns = plan.dialect.read(present, reading)
    except Unusable:
        return ""
    turns = [turn for turn in turns if turn["role"] == "assistant" or turn["content"]]
    if [turn["role"] for turn in turns] != ["assistant"]:
        return ""
    check_media(present, plan.keys, reading, "the record")
    _check_learned(present, plan, reading)
    refuse_thoughts(present, plan.keys, reading, "write it into the text")
    if "weight" in turns[0]:
        raise Unusable("not to be learned", "the only reply is marked so; delete the record or the mark")
    return turns[0]["content"]


def to_dialogue(record: object, source: str, reading: Reading | None = None, form: Form = "dialogues") -> Dialogue:
    reading = reading or Reading()
    record, plan = plan_record(_object(record), form)
    turns = _with_system(record, plan.dialect.read(record, reading))
    if not plan.is_plain:
        turns = _whole_prompt(turns, record, plan, reading)
        _check_learned(record, plan, reading)
        turns = _with_thought(turns, record, plan, reading)
    check_turns(turns)
    tools = tools_of(record)
    _note(source, turns, plan, reading)
    return Dialogue(turns, tools, source)


def to_taught(record: object, source: str, reading: Reading | None = None) -> Dialogue:
    """The dialogue of `to_dialogue`; an exam question is asked as in evaluation, and answered by its letter."""
    reading = reading or Reading()
    exam = as_taught(record, "letter")
    if exam is None:
        return to_dialogue(record, source, reading)
    dialogue = to_dialogue(exam, source, reading)
    reading.note("exam questions, asked for the letter as in evaluation", source)
    return dialogue


def to_prompt(record: object, source: str, reading: Reading | None = None) -> Dialogue:
    """A dialogue that may lack its last reply. Keys that judge this reply are ignored."""
    reading = reading or Reading()
    record, plan = plan_record(_object(record), "prompts")
    turns = _without_weights(_with_system(record, plan.dialect.read(record, reading)))
    if not plan.is_plain:
        turns = _whole_prompt(turns, record, plan, reading)
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        turns = turns[:-1]
    check_turns(turns, needs_reply=False)
    tools = tools_of(record)
    _note(source, turns, plan, reading)
    return Dialogue(turns, tools, source)


def to_question(record: object, source: str, reading: Reading | None = None) -> Question:
    """The dialogue of `to_prompt`; an exam question is asked as in evaluation."""
    record = _object(record)
    exam = to_exam(record)
    asked = record if exam is None else exam.as_record("letter")
    dialogue = to_prompt(asked, source, reading)
    _, plan = plan_record(asked, "prompts")
    rest = {key: value for key, value in asked.items() if key not in plan.dialect.required + plan.dialect.optional}
    return Question(dialogue.messages, dialogue.tools, source, exam, rest)


def to_pair(record: object, source: str, reading: Reading | None = None) -> Pair:
    reading = reading or Reading()
    record = _object(record)
    if is_labelled(record) and not is_pair(with_values(record)):
        raise Unusable(
            "single reply",
            f"has {quoted(record)}, one reply with a label where a pair has two; dpo_training.py --loss_type kto "
            "learns from single replies",
        )
    record, plan = plan_record(record, "pairs")
    turns, chosen, rejected = plan.dialect.read(record, reading)
    turns = _with_system(record, turns)
    if not plan.is_plain:
        turns = _whole_prompt(turns, record, plan, reading, (chosen, rejected))
        _check_learned(record, plan, reading)
        refuse_thoughts(record, plan.keys, reading, "write it into the reply that it led to, as <think>...</think>")
    turns = _without_weights(turns)
    check_turns([*turns, {"role": "assistant", "content": chosen}])
    if not rejected:
        raise Unusable("empty reply", "the rejected reply is empty; write it or delete the record")
    if chosen == rejected:
        raise Unusable("same replies", "chosen and rejected are the same, so nothing is preferred; delete the record")
    _note(source, turns, plan, reading)
    return Pair(turns, chosen, rejected, _margin(record), source, tools_of(record))


def to_feedback(record: object, source: str, reading: Reading | None = None) -> Feedback:
    """A dialogue of any dialect, or TRL's prompt and completion, with a label of its last reply."""
    reading = reading or Reading()
    record = _object(record)
    if is_pair(with_values(record)):
        raise Unusable(
            "preference pair",
            f"has {quoted(record)}, two replies where --loss_type kto learns from single ones with a label; leave out "
            "--loss_type, or give one for pairs: sigmoid",
        )
    is_desirable = feedback_of(record, reading)
    rest = {key: value for key, value in record.items() if key not in FEEDBACK_KEYS}
    dialogue = to_dialogue(rest, source, reading, "feedback")
    *turns, reply = dialogue.messages
    if "tool_calls" in reply or "weight" in reply:
        raise Unusable("not a reply", "the last turn calls tools or has a weight; feedback is on a reply in words")
    return Feedback(_without_weights(turns), reply["content"], is_desirable, source, dialogue.tools)


def turns_to_answer(messages: Sequence[dict]) -> list[dict]:
    """The messages of a conversation that ends with a question or a tool's result, as training reads them.

    Raises Unusable for content that is no text and for an order of turns that training never shows.
    """
    if messages and messages[-1]["role"] not in ("user", "tool"):
        where = f"turn {len(messages)} ({messages[-1]['role']})"
        raise Unusable("no question", f"{where} is the last; end with the user's question")
    return to_prompt({"messages": list(messages)}, "", Reading(null_words=False)).messages


def _margin(record: dict) -> float | None:
    """The margin of the chosen reply: the key `margin`, or the difference of the two scores."""
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
    """The turns, completed by the other keys of the question. Raises Unusable for a key that cannot be kept."""
    check_other_forms(record, plan, [*(turn["content"] for turn in turns), *replies], reading)
    check_media(record, plan.keys, reading, "the record")
    return with_options(turns, record, plan, reading) if plan.keys.options else turns


def _without_weights(turns: list[dict]) -> list[dict]:
    """The turns of a prompt, of which nothing is learned."""
    return [
        {key: value for key, value in turn.items() if key != "weight"} if "weight" in turn else turn for turn in turns
    ]


def _with_thought(turns: list[dict], record: dict, plan: RecordPlan, reading: Reading) -> list[dict]:
    """The turns, with the thought that a key of the record holds before the only reply, or the one beside a history."""
    replies = [turn for turn in turns if turn["role"] == "assistant"]
    if not plan.keys.thoughts or not replies or turns[-1] is not replies[-1] or not replies[-1]["content"]:
        return turns
    if plan.dialect.has_turns and len(replies) > 1:
        advice = "write it as 'reasoning_content' into the turn that it led to"
        refuse_thoughts(record, plan.keys, reading, advice, "\n".join(reply["content"] for reply in replies))
        return turns
    content = reply_with_thought(record, plan.keys, reading, "the record", replies[-1]["content"])
    return [*turns[:-1], turns[-1] | {"content": content}]


def _check_learned(record: dict, plan: RecordPlan, reading: Reading) -> None:
    """Raise Unusable where a key says that the reply is not to be learned."""
    if key := check_reply_keys(record, plan.keys, reading, "the record"):
        both = "; dpo_training.py --loss_type kto learns from good and bad replies" if key in FEEDBACK_KEYS else ""
        advice = f"delete the record, or {reading.ignoring(key)}{both}"
        raise Unusable("not to be learned", f"{key!r} is {record[key]!r}; {advice}")


# What stands in a text for a picture, a film or a sound.
_PLACEHOLDER = re.compile(r"<\|?(?:image|img|video|audio|vision)(?:[_ ][^<>]{0,40})?\|?>", re.IGNORECASE)
_ONLY_URLS = re.compile(r"(?:<?(?:https?://|www\.)[!-~]+\s*)+", re.IGNORECASE)


def _note(source: str, turns: list[dict], plan: RecordPlan, reading: Reading) -> None:
    """Note of a usable record what is worth a line."""
    if plan.keys.unknown:
        reading.note_keys(plan.keys.unknown)
    for turn in turns:
        if "<" in turn["content"]:
            _note_placeholder(turn["content"], source, reading)


def _note_placeholder(text: str, source: str, reading: Reading) -> None:
    """Count placeholders such as <image>; they may also be a text's topic, so they are not refused."""
    if mark := _PLACEHOLDER.search(text):
        reading.note(f"texts with {mark[0]}, of which only this word is learned", source)


def _with_system(record: dict, turns: list[dict]) -> list[dict]:
    """The turns with the record's system prompt first, whether it is in `system` or already the first turn."""
    prompts = {}
    if "system" in record or "system_prompt" in record:
        prompts = {f"'{key}'": optional_text(record, key) for key in ("system", "system_prompt")}
    if turns and turns[0]["role"] == "system":
        prompts["turn 1"], *turns = turns[0]["content"], *turns[1:]
    if not prompts:
        return turns
    places = {text: where for where, text in prompts.items() if text}
    if len(places) > 1:
        raise Unusable("two system prompts", f"one in {' and one in '.join(places.values())}; keep one")
    return [*({"role": "system", "content": text} for text in places), *turns]


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
    """Refuse turns out of order, empty turns and a last turn without a reply."""
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
