"""The named prompt templates of `--template_name`: how each writes a conversation.

Each is a jinja chat template, saved with the tokenizer, so that a server renders the text that training saw. A new one
is an entry of `TEMPLATES`; medtune/reading/chat_template.py finds the replies in whatever it renders.
"""

import difflib
import json
import re
from pathlib import Path
from string import Template

from medtune.errors import UserError
from medtune.reading.thinking import switch_thinking

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
