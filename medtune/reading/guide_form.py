"""Write records in the guide's form, which the stages read back unchanged."""

import json

import orjson

from medtune.reading.records import Dialogue, Feedback, Pair
from medtune.reading.turns import reads_as_turns


def guide_record(item: Dialogue | Pair | Feedback) -> dict:
    """The guide's record of a dialogue, a pair or a labelled reply; conversations.py reads it back unchanged."""
    if isinstance(item, Feedback):
        dialogue = Dialogue([*item.messages, {"role": "assistant", "content": item.reply}], item.tools, item.source)
        return _dialogue_record(dialogue) | {"label": item.is_desirable}
    return _dialogue_record(item) if isinstance(item, Dialogue) else _pair_record(item)


def guide_line(item: Dialogue | Pair | Feedback) -> str:
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
    """The guide's form; `conversations` if it cannot hold the turns (tools, texts that read as dialogues)."""
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
    contents = [message["content"] for message in messages]
    return {
        "system": system,
        "history": [list(exchange) for exchange in zip(contents[:-1:2], contents[1:-1:2], strict=True)],
        "question": contents[-1],
        "response_chosen": pair.chosen,
        "response_rejected": pair.rejected,
        **others,
    }
