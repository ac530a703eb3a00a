"""What a reply is made of: the thought that a model writes first, and the answer behind it."""

import re
from collections.abc import Sequence
from typing import NamedTuple

# HuatuoGPT-o1 writes headings; "## Thinking" counts at the start of a reply only, an answer may have such a section.
_MARK = re.compile(
    r"(?P<opening><think(?:ing)?>|\A\s*## Thinking[ \t]*$)|</think(?:ing)?>|^## Final Response[ \t]*$",
    re.MULTILINE,
)
_MARKS = ("<think>", "<thinking>", "</think>", "</thinking>", "## Thinking", "## Final Response")
OPENING = "<think>\n"
# As Qwen3.5's, Gemma 4's after a tool's result, and Magistral's.
_OPEN_PROMPT = re.compile(r"(<think(ing)?>|<\|channel>thought|\[THINK\])\s*$")


class ReplyParts(NamedTuple):
    """thought, answer: without their marks and the white space around them, "" where the reply has none.

    is_closed: False where the reply broke off in a thought.
    """

    thought: str
    answer: str
    is_closed: bool


def split_reply(reply: str, opened: bool = False) -> ReplyParts:
    """Split a reply into thought and answer; a thought that does not end is all thought.

    opened: the prompt ended in an open thought (`opens_thought`), so the reply begins inside it. A closing mark alone
        shows the same.
    """
    thoughts, answers = [], []
    is_open, start = opened, 0
    for mark in _MARK.finditer(reply):
        (thoughts if is_open else answers).append(reply[start : mark.start()])
        start = mark.end()
        if not mark["opening"] and not is_open:
            thoughts, answers = [*thoughts, *answers], []
        is_open = bool(mark["opening"])
    (thoughts if is_open else answers).append(reply[start:])
    return ReplyParts(_join(*thoughts), _join(*answers), not is_open)


def _join(*parts: str) -> str:
    return "\n\n".join(filter(None, map(str.strip, parts)))


def with_opening(reply: str, opened: bool) -> str:
    """A generated reply with the mark that opens its thought, also where that mark stands in the prompt."""
    return f"{OPENING}{reply}" if opened and not reply.startswith(OPENING.strip()) else reply


def opens_thought(prompt: str) -> bool:
    """Whether a rendered prompt ends in an open thought, as DeepSeek-R1's does, so that the reply begins inside it."""
    return bool(_OPEN_PROMPT.search(prompt))


class ReplySplitter:
    """Splits a reply while it is written; what was told is never taken back."""

    def __init__(self, opened: bool = False):
        self.opened = opened
        self.text = ""
        self.told = ReplyParts("", "", True)

    def add(self, piece: str) -> tuple[str, str]:
        """The new text of the thought and of the answer; an end that may become a mark waits for the next piece."""
        self.text += piece
        return self._news(before_part_of(_MARKS, self.text))

    def end(self) -> tuple[str, str]:
        """What waited of the thought and of the answer, once the reply is whole."""
        return self._news(self.text)

    def _news(self, text: str) -> tuple[str, str]:
        parts = split_reply(text, self.opened)
        if not parts.answer.startswith(self.told.answer):
            # A closing mark without an opening one: what was told as an answer was the thought, and stays told.
            self.told = ReplyParts(_join(self.told.thought, self.told.answer), "", True)
        news = parts.thought[len(self.told.thought) :], parts.answer[len(self.told.answer) :]
        self.told = parts
        return news


def before_part_of(texts: Sequence[str], text: str) -> str:
    """The text without an end that may become one of `texts` with what follows."""
    for start in range(max(len(text) - max(map(len, texts), default=0), 0), len(text)):
        if any(whole.startswith(text[start:]) and whole != text[start:] for whole in texts):
            return text[:start]
    return text
