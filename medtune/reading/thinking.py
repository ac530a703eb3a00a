"""What --thinking makes of a chat template: how it asks for a reply, and what it writes where there is no thought.

The choice is written into the jinja template itself, which is saved with the model, so that every server asks as
training did.
"""

import json
import re
from collections.abc import Callable
from typing import Literal

from medtune.errors import UserError
from medtune.reading.thoughts import opens_thought

# How a reply is written with what was thought before it: as Qwen3 and DeepSeek, as HuatuoGPT-o1, or without.
THOUGHT_FORMS = {
    "leave_out": "{1}",
    "think_tags": "<think>\n{0}\n</think>\n\n{1}",
    "headings": "## Thinking\n\n{0}\n\n## Final Response\n\n{1}",
}
# What is learned of thoughts: all as they are, nothing, or an empty one in the place of each.
Thinking = Literal["keep", "drop", "empty"]
CHOICES = "--thinking keep (thoughts are learned), drop (they are left out) or empty (an empty one is in their place)"
# Templates with this ending ask with an empty thought.
NOTHINK = "_nothink"

EMPTY_THOUGHT = re.compile(r"<think>\s*</think>\s*")
_QUESTION = {"role": "user", "content": "probe question"}
_THOUGHT, _ANSWER = "probe thought", "probe answer"
_OTHERWISE = "choose otherwise, or pass another --template_name"
# What this module writes before and around a template.
_SWITCH = re.compile(r"\A\{%- set enable_thinking = (?:true|false) %\}")
_REPLACING = re.compile(r"\A\{%- set rendered %\}(.*)\{% endset %\}\{\{- rendered\.replace\(.*\) \}\}\Z", re.DOTALL)

# (messages, tools, whether to ask for a reply, jinja) -> text
Render = Callable[[list[dict], None, bool, str], str]


def thinking_of_name(template_name: str | None, thinking: Thinking | None) -> Thinking | None:
    """--thinking, or what the template's name says. Raises UserError where they contradict each other."""
    if template_name is None or not template_name.endswith(NOTHINK):
        return thinking
    if thinking in (None, "empty"):
        return "empty"
    raise UserError(
        f"--thinking {thinking}: --template_name {template_name} asks for replies with an empty thought; leave the "
        f"flag out, or take --template_name {template_name.removesuffix(NOTHINK)}"
    )


def switch_thinking(jinja: str, on: bool) -> str:
    """The template with the variable `enable_thinking` fixed, whatever a server passes; itself if it reads none."""
    if "enable_thinking" not in jinja:
        return jinja
    return f"{{%- set enable_thinking = {'true' if on else 'false'} %}}{jinja}"


def template_for(thinking: Thinking, jinja: str, render: Render, name: str) -> str:
    """The template that asks and writes replies as `thinking` says; one that this function made gives the same again.

    name: for messages.
    """
    jinja = _as_it_came(jinja)
    if thinking == "keep":
        chosen = switch_thinking(jinja, on=True)
        if not any(_THOUGHT in render([_QUESTION, reply], None, False, chosen) for reply in _replies_with_thought()):
            raise UserError(f"--thinking keep: the chat template of {name} writes no thoughts; {_OTHERWISE}")
        return chosen
    # GLM marks every question where its switch is off, so it is off only where it must be.
    for on in (True, False) if thinking == "drop" else (False,):
        chosen = switch_thinking(jinja, on)
        if not opens_thought(render([_QUESTION], None, True, chosen)):
            break
    else:
        raise UserError(
            f"--thinking {thinking}: the chat template of {name} begins every reply with a thought; {_OTHERWISE}"
        )
    text = render([_QUESTION, {"role": "assistant", "content": _ANSWER}], None, False, chosen)
    empty = EMPTY_THOUGHT.search(text)
    if thinking == "drop":
        return _without_empty_thoughts(chosen, text, empty) if empty else chosen
    if not empty:
        raise UserError(
            f"--thinking empty: the chat template of {name} has no place for thoughts, so none for an empty one; "
            "--thinking drop leaves them out, or pass a --template_name that has a place, such as qwen3"
        )
    return chosen


def reads_thought_apart(render: Callable[[list[dict]], str]) -> bool:
    """Whether a template takes thoughts as `reasoning_content` only, and those in the text for words."""
    apart, inside = (render([_QUESTION, reply]) for reply in _replies_with_thought())
    return _THOUGHT in apart and apart != inside


def _replies_with_thought() -> list[dict]:
    apart = {"role": "assistant", "content": _ANSWER, "reasoning_content": _THOUGHT}
    return [apart, {"role": "assistant", "content": THOUGHT_FORMS["think_tags"].format(_THOUGHT, _ANSWER)}]


def _as_it_came(jinja: str) -> str:
    """The template without what this module has added."""
    replacing = _REPLACING.match(jinja)
    return _SWITCH.sub("", replacing[1] if replacing else jinja)


def _without_empty_thoughts(jinja: str, text: str, empty: re.Match) -> str:
    """The template that writes none; a text may still hold one in other places than where a reply begins."""
    before = text[text.rindex(_QUESTION["content"], 0, empty.start()) + len(_QUESTION["content"]) : empty.start()]
    old, new = (json.dumps(words, ensure_ascii=False) for words in (before + empty[0], before))
    # jinja takes a last line break off a template.
    written = jinja.removesuffix("\n")
    return f"{{%- set rendered %}}{written}{{% endset %}}{{{{- rendered.replace({old}, {new}) }}}}"
