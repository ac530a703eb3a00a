"""Which part of a rendered conversation is a reply to learn: found in the text that any jinja chat template writes.

So one mechanism serves the named templates of template.py and the tokenizers' own.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jinja2

from medtune.errors import UserError
from medtune.reading.messages import Message, unlearned
from medtune.reading.thinking import EMPTY_THOUGHT, THOUGHT_KEYS, Thinking, reads_thought_apart
from medtune.reading.thoughts import opens_thought, split_reply


class Segment(NamedTuple):
    """A stretch of rendered text; a learned one is a whole reply with its end token."""

    text: str
    learned: bool


_PASS_NAME = "pass a --template_name that fits the model"

_PROBE: list[Message] = [
    {"role": "user", "content": "probe question 1"},
    {"role": "assistant", "content": "probe answer 1"},
    {"role": "user", "content": "probe question 2"},
    {"role": "assistant", "content": "probe answer 2"},
]
_PROBE_THOUGHTS: list[Message] = [
    turn | {"content": f"<think>\nprobe thought\n</think>\n\n{turn['content']}"}
    if turn["role"] == "assistant"
    else turn
    for turn in _PROBE
]
_PROBE_TOOL = {
    "type": "function",
    "function": {"name": "probe", "description": "probe tool", "parameters": {"type": "object", "properties": {}}},
}
_PROBE_CALL: list[Message] = [
    {"role": "user", "content": "probe question"},
    {"role": "assistant", "content": "", "tool_calls": [{"name": "probe", "arguments": {}}]},
    {"role": "tool", "content": "probe result"},
]


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and its properties for training and generation, found in the text that it renders.

    name: for messages.
    render: (messages, tools, add_generation_prompt) -> text.
    special_tokens: all strings that the tokenizer takes for one token each, added ones included.
    control_tokens: those of them that stand for no words, which only the template may write.
    thinking: what it writes of thoughts; None leaves those of the texts to `render`.
    """

    name: str
    render: Callable[[list[Message], list[dict] | None, bool], str]
    special_tokens: Sequence[str]
    eos_token: str
    control_tokens: Sequence[str] = ()
    thinking: Thinking | None = None

    def prompt(self, messages: list[Message], tools: list[dict] | None = None) -> str:
        """The text that a reply to the last message continues."""
        return self.render(self._with_chosen_thoughts(messages), tools, True)

    def segments(
        self, messages: list[Message], tools: list[dict] | None = None, only_learned: bool = False
    ) -> list[Segment]:
        """The rendered conversation in segments; every reply runs from the end of its prompt through its end token.

        An eos token is added where the template writes no end token after the last reply.

        only_learned: a reply of weight 0 is no segment of its own, and need not be written as it was asked for.
        """
        messages = self._with_chosen_thoughts(messages)
        text = self.render(messages, tools, False)
        if messages[-1]["role"] == "assistant" and not self._ends[1]:
            text += self.eos_token
        replies = [
            index
            for index, message in enumerate(messages)
            if message["role"] == "assistant" and not (only_learned and message.get("weight") == 0)
        ]
        starts = [self._reply_start(text, messages, tools, index) for index in replies]

        segments, done = [], 0
        for index, start, limit in zip(replies, starts, [*starts, len(text)][1:], strict=True):
            end = self._reply_end(text, messages, index, start, limit)
            segments += [Segment(text[done:start], False), Segment(text[start:end], True)]
            done = end
        return [*segments, Segment(text[done:], False)] if done < len(text) else segments

    def examples(self, messages: list[Message]) -> list[list[Message]]:
        """The dialogue, or one for each of its questions, in which the replies to earlier ones are not learned.

        The latter where one text would teach an earlier reply behind another prompt than inference gives, or with
        another end; and where earlier replies lose thoughts that are to be learned. Where this is so of a call that its
        result and the answer follow, one for each reply.
        """
        followers = [*(message["role"] for message in messages[1:]), "user"]
        replies = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        answers = [index for index in replies if followers[index] == "user"]
        if len(answers) < len(replies) and self._rewrites_calls:
            ends = replies
        elif len(answers) > 1 and (self._rewrites_replies or self._loses_thoughts(messages[: answers[-2] + 1])):
            ends = answers
        else:
            return [messages]
        examples, done = [], 0
        for end in (index + 1 for index in ends):
            if any(messages[index].get("weight") != 0 for index in replies if done <= index < end):
                examples.append(unlearned(messages[:done]) + messages[done:end])
            done = end
        return examples

    @cached_property
    def _rewrites_replies(self) -> bool:
        """Whether a reply is written otherwise once another follows: behind another prompt, or with another end."""
        return self._dropped > 0 or self._ends[0] not in self.stop_tokens

    @cached_property
    def _rewrites_calls(self) -> bool:
        """Whether a call is written behind another prompt once its result and an answer follow."""
        if self.call_text is None:
            return False
        answered = [*_PROBE_CALL, {"role": "assistant", "content": "probe answer"}]
        asked = self.render(_PROBE_CALL[:1], [_PROBE_TOOL], True)
        return not self.render(answered, [_PROBE_TOOL], False).startswith(asked)

    def _loses_thoughts(self, earlier: list[Message]) -> bool:
        has_thoughts = any(turn["role"] == "assistant" and split_reply(turn["content"]).thought for turn in earlier)
        return self.thinking == "keep" and has_thoughts and not self._keeps_thoughts

    @cached_property
    def _keeps_thoughts(self) -> bool:
        """Whether it writes the thoughts of replies that others follow."""
        text = self.render(self._with_chosen_thoughts(_PROBE_THOUGHTS), None, False)
        return text.count("probe thought") == 2

    def control_token_in(self, text: str) -> str | None:
        """The first control token that a message's text holds."""
        match = self._control_pattern.search(text)
        return match and match[0]

    def cut_control_tokens(self, text: str, seam: str) -> str:
        """The text with a seam behind the first character of each control token."""
        return self._control_pattern.sub(lambda token: token[0][0] + seam + token[0][1:], text)

    @cached_property
    def stop_tokens(self) -> tuple[str, ...]:
        """The tokens that may end a reply, the usual one first."""
        middle_end, last_end = self._ends
        ends = [last_end] if self._ends_thoughts(middle_end) else [middle_end, last_end]
        return tuple(dict.fromkeys(token for token in [*ends, self.eos_token, self._call_end] if token))

    @cached_property
    def opens_thought(self) -> bool:
        """Whether a reply begins inside a thought, which the prompt opens."""
        return opens_thought(self.prompt(_PROBE[:1]))

    @cached_property
    def learns_thoughts(self) -> bool:
        return self.thinking in (None, "keep")

    @cached_property
    def writes_empty_thoughts(self) -> bool:
        """Whether it writes an empty thought before a reply that has none."""
        behind_question = self.render(_PROBE, None, False).partition("probe question 1")[2]
        return bool(EMPTY_THOUGHT.search(behind_question))

    def _with_chosen_thoughts(self, messages: list[Message]) -> list[Message]:
        if self.learns_thoughts and not self._reads_thought_apart:
            return messages
        return [
            self._with_chosen_thought(message) if message["role"] == "assistant" else message for message in messages
        ]

    def _with_chosen_thought(self, message: Message) -> Message:
        parts = split_reply(message["content"])
        if self.learns_thoughts:
            return (
                message
                | {"content": parts.answer}
                | dict.fromkeys(THOUGHT_KEYS if parts.thought else (), parts.thought)
            )
        # A thought alone stays, since a turn needs words.
        return message | {"content": parts.answer} if parts.answer or message.get("tool_calls") else message

    @cached_property
    def _reads_thought_apart(self) -> bool:
        return reads_thought_apart(lambda messages: self.render(messages, None, False))

    def _reply_start(self, text: str, messages: list[Message], tools: list[dict] | None, index: int) -> int:
        if index == 0 or messages[index - 1]["role"] == "assistant":
            raise UserError(f"message {index + 1} answers nothing: put a user or tool message before it")
        prompt = self.render(messages[:index], tools, True)
        if text.startswith(prompt):
            return len(prompt)
        start = len(prompt) - self._dropped
        if index + 1 == len(messages) or not text.startswith(prompt[:start]):
            raise UserError(
                f"chat template of {self.name}: it asks for message {index + 1} with a text that ends in "
                f"{prompt[-40:]!r}, but does not write the reply so; {_PASS_NAME}"
            )
        return start

    def _reply_end(self, text: str, messages: list[Message], index: int, start: int, limit: int) -> int:
        message, is_last = messages[index], index + 1 == len(messages)
        middle_end, last_end = self._ends
        # The end token is looked for behind the reply's own words, which may speak of it.
        words = "" if message.get("tool_calls") else split_reply(message["content"]).answer
        at = text.find(words, start, limit)
        start = at + len(words) if at >= 0 else start
        if message.get("tool_calls") and not (is_last and last_end is None):
            end_token = self._call_end
        else:
            end_token = (last_end or self.eos_token) if is_last else middle_end
        at = text.find(end_token, start, limit)
        if at < 0:
            raise UserError(f"chat template of {self.name}: no {end_token} ends message {index + 1}; {_PASS_NAME}")
        return at + len(end_token)

    @cached_property
    def _ends(self) -> tuple[str, str | None]:
        """The token after a reply that a user turn follows, and the one after the last reply.

        The first may be what opens the user turn; the second is None where the template writes none.
        """
        text = self.render(_PROBE, None, False)
        match = re.search(r"probe answer 1(.*)probe question 2.*probe answer 2(.*)", text, re.DOTALL)
        if match is None:
            raise UserError(f"chat template of {self.name}: it leaves out plain text messages; {_PASS_NAME}")
        gap, tail = match.groups()
        middle_end = self._leading_token(gap)
        if middle_end is None:
            raise UserError(
                f"chat template of {self.name}: it ends a reply with {gap!r}, which starts with no special "
                f"token of the tokenizer, so no model could learn to stop; {_PASS_NAME}"
            )
        return middle_end, self._leading_token(tail)

    @cached_property
    def _control_pattern(self) -> re.Pattern:
        tokens = {token for token in [*self.control_tokens, *self.stop_tokens] if token.strip()}
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))

    @cached_property
    def call_text(self) -> str | None:
        """How it writes a call of a tool, with what follows in its turn; None where it has no place for tools."""
        called, _ = self._call_and_result
        text = (called or "").rpartition(_PROBE_CALL[0]["content"])[2]
        return text if _PROBE_TOOL["function"]["name"] in text else None

    @cached_property
    def _call_and_result(self) -> tuple[str | None, str | None]:
        """A dialogue that ends with a call, and with its result; None for what it refuses."""
        try:
            called, answered = (self.render(_PROBE_CALL[:turns], [_PROBE_TOOL], False) for turns in (2, 3))
        except (UserError, jinja2.TemplateError):
            return None, None
        return called, answered

    @cached_property
    def _call_end(self) -> str:
        """The token after a call of a tool; the one after other replies where it has no place for calls."""
        middle_end, last_end = self._ends
        called, answered = self._call_and_result
        if called is None:
            return middle_end
        if last_end is None:
            return self._leading_token(answered.removeprefix(called)) or middle_end
        return next((token for token in self._tokens if called.rstrip().endswith(token)), middle_end)

    def _ends_thoughts(self, end_token: str) -> bool:
        """Whether the token after a reply ends a thought too, as gpt-oss's does, so that no reply is over at it."""
        text = self.render(self._with_chosen_thoughts(_PROBE_THOUGHTS[:2]), None, False)
        return end_token in text.partition("probe thought")[2].partition("probe answer 1")[0]

    @cached_property
    def _dropped(self) -> int:
        """How many characters of the generation prompt an earlier reply lacks (Qwen3's empty thought)."""
        text, prompt = self.render(_PROBE, None, False), self.prompt(_PROBE[:1])
        return next(n for n in range(len(prompt) + 1) if text.startswith(prompt[: len(prompt) - n]))

    def _leading_token(self, text: str) -> str | None:
        """The special token that `text` starts with, white space aside."""
        match = re.match(rf"\s*({'|'.join(map(re.escape, self._tokens))})", text)
        return match and match[1]

    @cached_property
    def _tokens(self) -> list[str]:
        """The longest first; without the runs of newlines among Gemma's, which end nothing."""
        tokens = {token for token in [*self.special_tokens, self.eos_token] if token.strip()}
        return sorted(tokens, key=len, reverse=True)
