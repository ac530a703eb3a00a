"""Render conversations: the named prompt templates, and which part of the text is a reply to learn.

Every template is a jinja chat template: a named one of this file, or the tokenizer's own. Saved with the
tokenizer it makes a server render the text that training saw; and `ChatTemplate` finds the replies in
whatever it renders, so that one mechanism serves them all.
"""

import difflib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from string import Template
from typing import Any, NamedTuple, TypedDict

import jinja2

from medtune.errors import UserError
from medtune.reading.thinking import EMPTY_THOUGHT, THOUGHT_KEYS, Thinking, reads_thought_apart, switch_thinking
from medtune.reading.thoughts import opens_thought, split_reply

# ---------------------------------------------------------------- formats of plain turns


def _jinja(pattern: str) -> str:
    """The jinja expression for a pattern with the fields {system}, {text}, {bos} and {eos}."""
    variables = {"system": "ns.system", "text": "text", "bos": "bos_token", "eos": "eos_token"}
    # With a group, re.split alternates literals and fields; `~` takes a missing bos_token for "".
    literals_and_fields = re.split(r"\{(\w+)\}", pattern)
    terms = [
        variables[part] if index % 2 else json.dumps(part, ensure_ascii=False)
        for index, part in enumerate(literals_and_fields)
    ]
    return f"({' ~ '.join(terms)})"


_TURNS = Template("""\
{%- if tools %}{{- raise_exception("template $name has no place for tools") }}{%- endif %}
{%- set first = messages[0] %}
{%- set ns = namespace(system=first.content$trim if first.role == "system" else $default_system) %}
{{- $start }}
{%- if ns.system is not none %}{{- $system }}{%- endif %}
{%- for message in messages %}
  {%- set text = message.content$trim %}
  {%- if message.role == "user" %}
    {%- if ns.system %}{%- set text = $system_in_user %}{%- set ns.system = none %}{%- endif %}
    {{- $user }}
  {%- elif message.role == "assistant" %}
    {{- $header ~ $reply }}
  {%- elif not (loop.first and message.role == "system") %}
    {{- raise_exception("template $name has no place for a later message of role " ~ message.role) }}
  {%- endif %}
{%- endfor %}
{{- $header if add_generation_prompt else $finish }}""")


def _turns(
    name: str,
    *,
    user: str,
    header: str,
    reply: str,
    start: str = "",
    system: str = "",
    system_in_user: str = "{text}",
    default_system: str | None = None,
    finish: str = "",
    trim: bool = False,
) -> str:
    """A template without tools, from one pattern for each turn; `header` opens a reply.

    The system text is a turn of its own (`system`) or stands in the first user turn (`system_in_user`).
    """
    return _TURNS.substitute(
        name=name,
        start=_jinja(start),
        system=_jinja(system),
        system_in_user=_jinja(system_in_user),
        user=_jinja(user),
        header=_jinja(header),
        reply=_jinja(reply),
        finish=_jinja(finish),
        default_system="none" if default_system is None else _jinja(default_system),
        trim=" | trim" if trim else "",
    )


def _chatml(name: str, start: str = "") -> str:
    return _turns(
        name,
        start=start,
        system="<|im_start|>system\n{system}<|im_end|>\n",
        user="<|im_start|>user\n{text}<|im_end|>\n",
        header="<|im_start|>assistant\n",
        reply="{text}<|im_end|>\n",
    )


# ---------------------------------------------------------------- formats with tools and reasoning

_PIECES = {
    # Sets ns.last_user, after which a thought is kept.
    "find_last_user": """\
{%- set ns = namespace(last_user=-1) %}
{%- for message in messages %}
  {%- if message.role == "user" %}{%- set ns.last_user = loop.index0 %}{%- endif %}
{%- endfor %}""",
    # Sets `thought`, "" in a reply that a later user turn follows, and takes `<think>...</think>` off `text`.
    "split_thought": r"""
    {%- set thought = message.reasoning_content if message.reasoning_content is string else message.thinking %}
    {%- if thought is not string and "</think>" in text %}
      {%- set thought = text.split("</think>")[0].split("<think>")[-1] %}
      {%- set text = text.split("</think>")[-1].lstrip("\n") %}
    {%- endif %}
    {%- set thought = thought.strip("\n") if thought is string and loop.index0 > ns.last_user else "" %}""",
    "json_calls": r"""
    {%- for call in message.tool_calls or [] %}
      {%- set call = call.function or call %}
      {{- "\n" if text or not loop.first else "" }}
      {{- '<tool_call>\n{"name": "' ~ call.name ~ '", "arguments": ' ~ (call.arguments | tojson) }}
      {{- "}\n</tool_call>" }}
    {%- endfor %}""",
    # How a template of a model that thinks is told to ask for a reply without a thought.
    "asks_for_none": "(enable_thinking is defined and not enable_thinking)",
}
_QWEN3_THOUGHT = (
    _PIECES["split_thought"]
    + r"""
    {%- if loop.index0 > ns.last_user and (loop.last or thought) %}
      {{- "<think>\n" ~ thought ~ "\n</think>\n\n" }}
      {%- set text = text.lstrip("\n") %}
    {%- endif %}"""
)
_QWEN3_ASK = r"""
{%- if add_generation_prompt and enable_thinking is defined and not enable_thinking %}
  {{- "<think>\n\n</think>\n\n" }}
{%- endif %}"""
_LFM2_5_THOUGHT = (
    _PIECES["split_thought"]
    + """
    {{- "<think>" ~ thought ~ "</think>" if thought else "" }}"""
)


def _of_file(name: str, **fields: str) -> str:
    """The template in templates/, its $names filled with the pieces above and `fields`."""
    file = Path(__file__).parent / "templates" / f"{name}.jinja"
    return Template(file.read_text(encoding="utf-8")).substitute(_PIECES, **fields)


def _qwen(*, default_system: str = "none", thought: str = "", ask: str = "") -> str:
    return _of_file("qwen", default_system=default_system, thought=thought, ask=ask)


def _gemma(name: str) -> str:
    return _turns(
        name,
        start="{bos}",
        system_in_user="{system}\n\n{text}",
        user="<start_of_turn>user\n{text}<end_of_turn>\n",
        header="<start_of_turn>model\n",
        reply="{text}<end_of_turn>\n",
        trim=True,
    )


# ---------------------------------------------------------------- the named templates

TEMPLATES: dict[str, str] = {
    "qwen": _qwen(default_system=_jinja("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")),
    "qwen3": _qwen(thought=_QWEN3_THOUGHT, ask=_QWEN3_ASK),
    "qwen3_nothink": switch_thinking(_qwen(thought=_QWEN3_THOUGHT, ask=_QWEN3_ASK), on=False),
    "qwen3_instruct_2507": _qwen(),
    "qwen3_5": _of_file("qwen3_5"),
    "qwen3_5_nothink": switch_thinking(_of_file("qwen3_5"), on=False),
    "chatml": _chatml("chatml"),
    "yi": _chatml("yi"),
    "internlm2": _chatml("internlm2", start="{bos}"),
    "llama2": _turns(
        "llama2",
        system_in_user="<<SYS>>\n{system}\n<</SYS>>\n\n{text}",
        user="{bos}[INST] {text} [/INST]",
        header="",
        reply=" {text} {eos}",
        trim=True,
    ),
    "llama3": _of_file("llama3"),
    "mistral": _of_file("mistral"),
    "ministral3": _of_file("ministral3"),
    "gemma": _gemma("gemma"),
    "gemma3": _gemma("gemma3"),
    "gemma4": _of_file("gemma4"),
    "phi": _turns(
        "phi",
        system="<|system|>\n{system}<|end|>\n",
        user="<|user|>\n{text}<|end|>\n",
        header="<|assistant|>\n",
        reply="{text}<|end|>\n",
        finish="{eos}",
    ),
    "deepseek": _turns(
        "deepseek",
        start="{bos}",
        system="{system}",
        user="<｜User｜>{text}",
        header="<｜Assistant｜>",
        reply="{text}{eos}",
    ),
    "glm4": _turns(
        "glm4",
        start="[gMASK]<sop>",
        system="<|system|>\n{system}",
        user="<|user|>\n{text}",
        header="<|assistant|>",
        reply="\n{text}",
    ),
    "glm4_moe": _of_file("glm4_moe"),
    "gptoss": _of_file("gptoss"),
    "granite": _of_file("granite"),
    "lfm2": _of_file("lfm2", is_newer="false", thought=""),
    "lfm2_5": _of_file("lfm2", is_newer="true", thought=_LFM2_5_THOUGHT),
    "minicpm": _of_file("minicpm"),
    "smollm3": _of_file("smollm3"),
    # Baichuan2's own history has no end token in it, yet generation stops at eos alone: every reply gets one.
    "baichuan2": _turns(
        "baichuan2",
        system="{system}",
        user="<reserved_106>{text}",
        header="<reserved_107>",
        reply="{text}{eos}",
    ),
    "vicuna": _turns(
        "vicuna",
        start="{bos}",
        default_system=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
        system="{system} ",
        user="USER: {text} ",
        header="ASSISTANT:",
        reply=" {text}{eos}",
        trim=True,
    ),
    # A header's last newline would merge with one that starts a reply, so texts are trimmed from here on.
    "alpaca": _turns(
        "alpaca",
        start="{bos}",
        default_system=(
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        ),
        system="{system}\n\n",
        user="### Instruction:\n{text}\n\n",
        header="### Response:\n",
        reply="{text}{eos}\n\n",
        trim=True,
    ),
    "zephyr": _turns(
        "zephyr",
        system="<|system|>\n{system}{eos}\n",
        user="<|user|>\n{text}{eos}\n",
        header="<|assistant|>\n",
        reply="{text}{eos}\n",
        trim=True,
    ),
    "plain": _turns(
        "plain",
        start="{bos}",
        system="{system}\n",
        user="{text}\n",
        header="",
        reply="{text}{eos}\n",
        trim=True,
    ),
}


def named_template(name: str) -> str:
    """The jinja of `--template_name`."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    nearest = difflib.get_close_matches(name.lower(), TEMPLATES, n=1)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    known = ", ".join(sorted(TEMPLATES))
    raise UserError(f"--template_name {name}: no such template; {hint}known are {known}")


# ---------------------------------------------------------------- what a reply is


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
