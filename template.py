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
from string import Template
from typing import Any, NamedTuple, TypedDict

from medtune.errors import UserError
from medtune.reading.thinking import EMPTY_THOUGHT, Thinking, reads_thought_apart, switch_thinking
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

# Sets ns.last_user, after which a reasoning block is kept.
_FIND_LAST_USER = """\
{%- set ns = namespace(last_user=-1) %}
{%- for message in messages %}
  {%- if message.role == "user" %}{%- set ns.last_user = loop.index0 %}{%- endif %}
{%- endfor %}"""

# Takes `<think>...</think>` off `text`; `thought` is empty in a reply that a later user turn follows.
_SPLIT_THOUGHT = r"""
    {%- set thought = message.reasoning_content if message.reasoning_content is string else "" %}
    {%- if message.reasoning_content is not string and "</think>" in text %}
      {%- set thought = text.split("</think>")[0].split("<think>")[-1] %}
      {%- set text = text.split("</think>")[-1].lstrip("\n") %}
    {%- endif %}
    {%- set thought = thought.strip("\n") if loop.index0 > ns.last_user else "" %}"""

_QWEN3_THOUGHT = (
    _SPLIT_THOUGHT
    + r"""
    {%- if loop.index0 > ns.last_user and (loop.last or thought) %}
      {{- "<think>\n" ~ thought ~ "\n</think>\n\n" }}
      {%- set text = text.lstrip("\n") %}
    {%- endif %}"""
)

_QWEN = Template(
    _FIND_LAST_USER
    + r"""
{%- set system = messages[0].content if messages[0].role == "system" else $default_system %}
{%- if tools %}
  {{- "<|im_start|>system\n" ~ (system ~ "\n\n" if system is not none else "") }}
  {{- "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n" }}
  {{- "You are provided with function signatures within <tools></tools> XML tags:\n<tools>" }}
  {%- for tool in tools %}{{- "\n" ~ (tool | tojson) }}{%- endfor %}
  {{- "\n</tools>\n\nFor each function call, return a json object with function name and arguments within " }}
  {{- "<tool_call></tool_call> XML tags:\n<tool_call>\n" }}
  {{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' }}
{%- elif system is not none %}
  {{- "<|im_start|>system\n" ~ system ~ "<|im_end|>\n" }}
{%- endif %}
{%- for message in messages %}
  {%- set text = message.content or "" %}
  {%- if message.role == "assistant" %}
    {{- "<|im_start|>assistant\n" }}
    $thought
    {{- text }}
    {%- for call in message.tool_calls or [] %}
      {%- set call = call.function or call %}
      {{- "\n" if text or not loop.first else "" }}
      {{- '<tool_call>\n{"name": "' ~ call.name ~ '", "arguments": ' ~ (call.arguments | tojson) }}
      {{- "}\n</tool_call>" }}
    {%- endfor %}
    {{- "<|im_end|>\n" }}
  {%- elif message.role == "tool" %}
    {{- "<|im_start|>user" if loop.first or loop.previtem.role != "tool" else "" }}
    {{- "\n<tool_response>\n" ~ text ~ "\n</tool_response>" }}
    {{- "<|im_end|>\n" if loop.last or loop.nextitem.role != "tool" else "" }}
  {%- elif not (loop.first and message.role == "system") %}
    {{- "<|im_start|>" ~ message.role ~ "\n" ~ text ~ "<|im_end|>\n" }}
  {%- endif %}
{%- endfor %}
{{- "<|im_start|>assistant\n" if add_generation_prompt else "" }}$ask"""
)

# How a template of a model that thinks is told to ask for a reply without a thought.
_ASKS_FOR_NONE = "enable_thinking is defined and not enable_thinking"
_QWEN3_ASK = rf"""
{{%- if add_generation_prompt and {_ASKS_FOR_NONE} %}}{{{{- "<think>\n\n</think>\n\n" }}}}{{%- endif %}}"""

_GLM4_MOE = (
    _FIND_LAST_USER
    + f"""
{{%- set no_thought = {_ASKS_FOR_NONE} %}}"""
    + r"""
{{- "[gMASK]<sop>" }}
{%- if tools %}
  {{- "<|system|>\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n" }}
  {{- "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n" }}
  {%- for tool in tools %}{{- (tool | tojson) ~ "\n" }}{%- endfor %}
  {{- "</tools>\n\nFor each function call, output the function name and arguments within the following " }}
  {{- "XML format:\n<tool_call>{function-name}\n" }}
  {{- "<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}</arg_value>\n" }}
  {{- "<arg_key>{arg-key-2}</arg_key>\n<arg_value>{arg-value-2}</arg_value>\n...\n</tool_call>" }}
{%- endif %}
{%- for message in messages %}
  {%- set text = message.content or "" %}
  {%- if message.role == "assistant" %}"""
    + _SPLIT_THOUGHT
    + r"""
    {{- "<|assistant|>\n<think>" ~ (thought | trim) ~ "</think>" }}
    {{- "\n" ~ (text | trim) if text | trim else "" }}
    {%- for call in message.tool_calls or [] %}
      {%- set call = call.function or call %}
      {{- "\n<tool_call>" ~ call.name ~ "\n" }}
      {%- for key, value in call.arguments.items() %}
        {{- "<arg_key>" ~ key ~ "</arg_key>\n<arg_value>" }}
        {{- (value if value is string else value | tojson) ~ "</arg_value>\n" }}
      {%- endfor %}
      {{- "</tool_call>" }}
    {%- endfor %}
  {%- elif message.role == "tool" %}
    {{- "<|observation|>" if loop.first or loop.previtem.role != "tool" else "" }}
    {{- "\n<tool_response>\n" ~ text ~ "\n</tool_response>" }}
  {%- else %}
    {{- "<|" ~ message.role ~ "|>\n" ~ text }}
    {{- "/nothink" if message.role == "user" and no_thought and not text.endswith("/nothink") else "" }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|assistant|>" ~ ("\n<think></think>" if no_thought else "") }}{%- endif %}"""
)


def _qwen(*, default_system: str = "none", thought: str = "", ask: str = "") -> str:
    return _QWEN.substitute(default_system=default_system, thought=thought, ask=ask)


# ---------------------------------------------------------------- the named templates

TEMPLATES: dict[str, str] = {
    "qwen": _qwen(default_system=_jinja("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")),
    "qwen3": _qwen(thought=_QWEN3_THOUGHT, ask=_QWEN3_ASK),
    "qwen3_nothink": switch_thinking(_qwen(thought=_QWEN3_THOUGHT, ask=_QWEN3_ASK), on=False),
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
    "llama3": _turns(
        "llama3",
        start="{bos}",
        system="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>",
        header="<|start_header_id|>assistant<|end_header_id|>\n\n",
        reply="{text}<|eot_id|>",
        trim=True,
    ),
    # Mistral's own v0.3 template moves the system text on to the last user turn, which changes the prompts of
    # the earlier replies. Here it stays in the first.
    "mistral": _turns(
        "mistral",
        start="{bos}",
        system_in_user="{system}\n\n{text}",
        user="[INST] {text}[/INST]",
        header="",
        reply=" {text}{eos}",
        trim=True,
    ),
    "gemma": _turns(
        "gemma",
        start="{bos}",
        system_in_user="{system}\n\n{text}",
        user="<start_of_turn>user\n{text}<end_of_turn>\n",
        header="<start_of_turn>model\n",
        reply="{text}<end_of_turn>\n",
        trim=True,
    ),
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
    "glm4_moe": _GLM4_MOE,
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

    def segments(self, messages: list[Message], tools: list[dict] | None = None) -> list[Segment]:
        """The rendered conversation in segments; every reply runs from the end of its prompt through its end token.

        An eos token is added where the template writes no end token after the last reply.
        """
        messages = self._with_chosen_thoughts(messages)
        text = self.render(messages, tools, False)
        if messages[-1]["role"] == "assistant" and not self._ends[1]:
            text += self.eos_token
        replies = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        starts = [self._reply_start(text, messages, tools, index) for index in replies]

        segments, done = [], 0
        for index, start, limit in zip(replies, starts, [*starts[1:], len(text)], strict=True):
            end = self._reply_end(text, messages, index, start, limit)
            segments += [Segment(text[done:start], False), Segment(text[start:end], True)]
            done = end
        return [*segments, Segment(text[done:], False)] if done < len(text) else segments

    def control_token_in(self, text: str) -> str | None:
        """The first control token that a message's text holds."""
        match = self._control_pattern.search(text)
        return match and match[0]

    def cut_control_tokens(self, text: str, seam: str) -> str:
        """The text with a seam behind the first character of each control token."""
        return self._control_pattern.sub(lambda token: token[0][0] + seam + token[0][1:], text)

    @property
    def stop_tokens(self) -> tuple[str, ...]:
        """The tokens that may end a reply."""
        return tuple(dict.fromkeys(token for token in [*self._ends, self.eos_token] if token))

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
        return bool(EMPTY_THOUGHT.search(self.render(_PROBE, None, False)))

    def _with_chosen_thoughts(self, messages: list[Message]) -> list[Message]:
        if self.learns_thoughts and not (self.thinking and self._reads_thought_apart):
            return messages
        return [
            self._with_chosen_thought(message) if message["role"] == "assistant" else message for message in messages
        ]

    def _with_chosen_thought(self, message: Message) -> Message:
        parts = split_reply(message["content"])
        if self.learns_thoughts:
            return message | {"content": parts.answer, "reasoning_content": parts.thought}
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
        message = messages[index]
        # The end token is looked for behind the reply's own words, which may speak of it.
        words = "" if message.get("tool_calls") else message["content"].strip()
        at = text.find(words, start, limit)
        start = at + len(words) if at >= 0 else start
        middle_end, last_end = self._ends
        if index + 1 == len(messages):
            end_token = last_end or self.eos_token
        else:
            end_token = self._call_end if messages[index + 1]["role"] == "tool" else middle_end
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
    def _call_end(self) -> str:
        """The token after a tool call that a tool turn follows."""
        middle_end, last_end = self._ends
        if last_end:
            return middle_end
        called, answered = (self.render(_PROBE_CALL[:turns], None, False) for turns in (2, 3))
        return self._leading_token(answered.removeprefix(called)) or middle_end

    @cached_property
    def _dropped(self) -> int:
        """How many characters of the generation prompt an earlier reply lacks (Qwen3's empty thought)."""
        text, prompt = self.render(_PROBE, None, False), self.prompt(_PROBE[:1])
        return next(n for n in range(len(prompt) + 1) if text.startswith(prompt[: len(prompt) - n]))

    def _leading_token(self, text: str) -> str | None:
        """The special token that `text` starts with, white space aside."""
        # Gemma's added tokens hold runs of newlines, which end nothing.
        tokens = {token for token in [*self.special_tokens, self.eos_token] if token.strip()}
        longest_first = sorted(tokens, key=len, reverse=True)
        match = re.match(rf"\s*({'|'.join(map(re.escape, longest_first))})", text)
        return match and match[1]
