"""Write records in the guide's form, which the stages read back unchanged."""

import json

import orjson

from medtune.reading.records import Dialogue, Feedback, Pair
from medtune.reading.turns import reads_as_turns


def guide_record(item: Dialogue | Pair | Feedback) -> dict:
    """The guide's record of a dialogue, a pair or a labelled reply; conversations.py reads it back unchanged."""
    if isinstance(item, Feedback):
        dialogue = Dialogue([*item.messages, {"role": "assistant", "content": item.reply}], item.tools, item.source)
        return guide_record(dialogue) | {"label": item.is_desirable}
    system, messages = "", item.messages
    if messages[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    tools = {"tools": item.tools} if item.tools else {}
    if isinstance(item, Pair):
        return {"system": system, **_pair_record(messages, item), **tools}
    head = {"system": system} if messages is not item.messages else {}
    return {**head, **tools, "conversations": [_sharegpt_turn(message) for message in messages]}


def guide_line(item: Dialogue | Pair | Feedback) -> str:
    """The guide's record as a line of a .jsonl file."""
    record = guide_record(item)
    try:
        return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE).decode()
    except TypeError:  # an integer of more than 64 bits, in tools
        return json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n"


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


def _pair_record(messages: list[dict], pair: Pair) -> dict:
    """The guide's form; `conversations` if it cannot hold the turns (tools, texts that read as dialogues)."""
    margin = {} if pair.margin is None else {"margin": pair.margin}
    texts = (messages[-1]["content"], pair.chosen, pair.rejected)
    used_tools = any(message["role"] == "tool" or message.get("tool_calls") for message in messages[:-1])
    if used_tools or any(map(reads_as_turns, texts)):
        turns = [_sharegpt_turn(message) for message in messages]
        replies = {key: {"from": "gpt", "value": getattr(pair, key)} for key in ("chosen", "rejected")}
        return {"conversations": turns, **replies, **margin}
    contents = [message["content"] for message in messages]
    history = [list(exchange) for exchange in zip(contents[:-1:2], contents[1:-1:2], strict=True)]
    replies = {"response_chosen": pair.chosen, "response_rejected": pair.rejected}
    return {"history": history, "question": contents[-1], **replies, **margin}
