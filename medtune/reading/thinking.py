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

# The variables by which templates are told to think or not, and how a template is known to read each: Qwen3's, which
# most others have too, and DeepSeek-V3.1's.
_SWITCHES = {
    "enable_thinking": re.compile(r"\benable_thinking\b"),
    "thinking": re.compile(r"(?<![.\w])thinking is (?:not )?defined"),
}
# DeepSeek-V3.1's has no opening mark.
EMPTY_THOUGHT = re.compile(r"(?:<think>\s*)?</think>\s*")
# Where templates read a thought that stands apart from the text: most of them, and gpt-oss's.
THOUGHT_KEYS = ("reasoning_content", "thinking")
_QUESTION = {"role": "user", "content": "probe question"}
_THOUGHT, _ANSWER = "probe thought", "probe answer"
_OTHERWISE = "choose otherwise, or pass another --template_name"
# What this module writes before and around a template.
_SWITCH = re.compile(rf"\A(?:\{{%- set (?:{'|'.join(_SWITCHES)}) = (?:true|false) %\}})+")
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


def has_switch(jinja: str) -> bool:
    """Whether a template can be told to think or not."""
    return any(pattern.search(jinja) for pattern in _SWITCHES.values())


def switch_thinking(jinja: str, on: bool) -> str:
    """The template with the variables that switch thinking fixed, whatever a server passes; itself if it reads none."""
    names = [name for name, pattern in _SWITCHES.items() if pattern.search(jinja)]
    return "".join(f"{{%- set {name} = {'true' if on else 'false'} %}}" for name in names) + jinja


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
    on, off = switch_thinking(jinja, on=True), switch_thinking(jinja, on=False)
    # What it does by itself comes first: GLM marks every question where its switch is off, Gemma 4 where it is on.
    by_itself = _asked(render, jinja)
    default = next((choice for choice in (on, off) if _asked(render, choice) == by_itself), jinja)
    for chosen in (default, on, off) if thinking == "drop" else (off,):
        if not opens_thought(_asked(render, chosen)):
            break
    else:
        raise UserError(
            f"--thinking {thinking}: the chat template of {name} begins every reply with a thought; {_OTHERWISE}"
        )
    text = render([_QUESTION, {"role": "assistant", "content": _ANSWER}], None, False, chosen)
    header = text.rpartition(_QUESTION["content"])[2].partition(_ANSWER)[0]
    empty = EMPTY_THOUGHT.search(header)
    if thinking == "drop":
        return _without_empty_thoughts(chosen, header[: empty.end()], empty[0]) if empty else chosen
    if not empty:
        raise UserError(
            f"--thinking empty: the chat template of {name} has no place for thoughts, so none for an empty one; "
            "--thinking drop leaves them out, or pass a --template_name that has a place, such as qwen3"
        )
    return chosen


def _asked(render: Render, jinja: str) -> str:
    return render([_QUESTION], None, True, jinja)


def reads_thought_apart(render: Callable[[list[dict]], str]) -> bool:
    """Whether a template takes thoughts in keys of their own only, and those in the text for words."""
    apart, inside = (render([_QUESTION, reply]) for reply in _replies_with_thought())
    return _THOUGHT in apart and apart != inside


def _replies_with_thought() -> list[dict]:
    apart = {"role": "assistant", "content": _ANSWER} | dict.fromkeys(THOUGHT_KEYS, _THOUGHT)
    return [apart, {"role": "assistant", "content": THOUGHT_FORMS["think_tags"].format(_THOUGHT, _ANSWER)}]


def _as_it_came(jinja: str) -> str:
    """The template without what this module has added."""
    replacing = _REPLACING.match(jinja)
    return _SWITCH.sub("", replacing[1] if replacing else jinja)


def _without_empty_thoughts(jinja: str, header: str, empty: str) -> str:
    """The template that writes none; a text may still hold one in other places than where a reply begins.

    header: what stands between a question and its answer, to the end of the empty thought.
    """
    old, new = (json.dumps(words, ensure_ascii=False) for words in (header, header.removesuffix(empty)))
    # jinja takes a last line break off a template.
    written = jinja.removesuffix("\n")
    return f"{{%- set rendered %}}{written}{{% endset %}}{{{{- rendered.replace({old}, {new}) }}}}"
