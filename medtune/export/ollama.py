"""Ollama's Modelfile: the model's chat template in Go's language, its stop tokens and its default system prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

from medtune.errors import UserError
from medtune.reading.chat_template import ChatTemplate
from medtune.reading.messages import Message

# Words that no template has.
_SYSTEM, _QUESTION, _REPLY, _NEXT = "probe system", "probe question", "probe answer", "probe next"


@dataclass(frozen=True)
class TurnTexts:
    """What a template writes around the texts of a conversation.

    start: before all turns.
    system, user, assistant: before and after a text of that role.
    opening: before a reply that is asked for, behind what follows a question.
    default_system: the system text that the template adds by itself, "" for none.
    """

    start: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    opening: str
    default_system: str = ""

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt that asks for the next reply."""
        if self.default_system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default_system}, *messages]
        turns = ((getattr(self, message["role"]), message["content"]) for message in messages)
        return self.start + "".join(before + text + after for (before, after), text in turns) + self.opening


def modelfile(chat_template: ChatTemplate, gguf_file: str, context: int, bos_token: str | None) -> str | None:
    """Ollama's Modelfile; None for a template that is more than texts around each turn.

    Args:
        bos_token: which llama.cpp puts before a prompt by itself.
    """
    texts = turn_texts(chat_template, bos_token or "")
    if texts is None:
        return None
    roles = {"system": texts.system, "user": texts.user, "assistant": texts.assistant}
    cases = "{{ else ".join(
        f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}' for role, (before, after) in roles.items()
    )
    lines = [
        f"FROM ./{gguf_file}",
        f'TEMPLATE """{texts.start}{{{{ range .Messages }}}}{{{{ {cases}{{{{ end }}}}{{{{ end }}}}{texts.opening}"""',
    ]
    lines += [f'SYSTEM """{texts.default_system}"""'] if texts.default_system else []
    lines += [f'PARAMETER stop "{token}"' for token in chat_template.stop_tokens]
    lines += [f"PARAMETER num_ctx {min(context, 4096)}", "PARAMETER temperature 0", "PARAMETER repeat_penalty 1.0"]
    return "\n".join(lines) + "\n"


def turn_texts(chat_template: ChatTemplate, bos_token: str) -> TurnTexts | None:
    """What a template writes around each turn, where that says all that it does in conversations without tools."""

    def prompt(*messages: Message) -> str:
        return chat_template.prompt(messages).removeprefix(bos_token)

    question, reply = _turn("user", _QUESTION), _turn("assistant", _REPLY)
    system, following = _turn("system", _SYSTEM), _turn("user", _NEXT)
    try:
        head, opening = prompt(question).split(_QUESTION)
        between = prompt(question, reply, following).partition(_QUESTION)[2]
        before_reply, between = between.split(_REPLY)
        before_question = between.split(_NEXT)[0]
        system_head, system_tail = prompt(system, question).split(_SYSTEM)
    except (UserError, ValueError):  # no place for a system turn, or a text that is not there once
        return None
    system_tail = system_tail.split(_QUESTION)[0]
    after_question = _common_start(before_reply, opening)
    before_user = _common_end(before_question, system_tail, head)
    start = head.removesuffix(before_user)
    after_system, default_system = system_tail.removesuffix(before_user), ""
    if not system_head.startswith(start):
        # The head holds a system turn of its own.
        start, own = _common_start(system_head, start), start
        before_system = system_head.removeprefix(start)
        if not own.startswith(start + before_system) or not own.endswith(after_system):
            return None
        default_system = own.removeprefix(start + before_system).removesuffix(after_system)
    texts = TurnTexts(
        start=start,
        system=(system_head.removeprefix(start), after_system),
        user=(before_user, after_question),
        assistant=(before_reply.removeprefix(after_question), before_question.removesuffix(before_user)),
        opening=opening.removeprefix(after_question),
        default_system=default_system,
    )
    probes = [[question], [system, question], [question, reply, following, reply, question]]
    probes.append([system, *probes[-1]])
    return texts if all(texts.render(probe) == prompt(*probe) for probe in probes) else None


def _turn(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def _common_start(*texts: str) -> str:
    n_same = next((n for n, letters in enumerate(zip(*texts, strict=False)) if len(set(letters)) > 1), None)
    return min(texts, key=len)[:n_same]


def _common_end(*texts: str) -> str:
    return _common_start(*(text[::-1] for text in texts))[::-1]
