"""What a conversation is made of: messages and the calls of tools in them."""

from collections.abc import Sequence
from typing import Any, TypedDict


class ToolCall(TypedDict):
    name: str
    arguments: dict[str, Any]


class Message(TypedDict, total=False):
    """A turn: role is system, user, assistant or tool; only an assistant's turn may hold tool_calls.

    An assistant's thought stands in its content, `<think>...</think>` before the answer.
    """

    role: str
    content: str
    tool_calls: list[ToolCall]
    weight: int  # 0 for a reply that is not learned


def unlearned(messages: Sequence[Message]) -> list[Message]:
    """The messages, with replies that are there to be read."""
    return [message | {"weight": 0} if message["role"] == "assistant" else message for message in messages]
