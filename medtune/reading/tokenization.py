"""Encode records to token ids and labels: which tokens carry loss, and what happens at the length limit.

Training renders a dialogue with the chat template and tokenizes the whole text once, as a server does; the template's
segments say which characters are replies, the tokenizer's offsets which tokens those are. Learned are exactly the
replies and the token that ends each.
"""

import json
from bisect import bisect_left
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Literal

import jinja2
from transformers import PreTrainedTokenizerBase

from medtune.errors import Unusable, UserError
from medtune.reading.chat_template import ChatTemplate
from medtune.reading.messages import Message, unlearned
from medtune.reading.thinking import Thinking, template_for, thinking_of_name
from medtune.reading.thoughts import opens_thought, split_reply
from template import TEMPLATES, named_template

IGNORED_LABEL = -100  # torch.nn.functional.cross_entropy's ignore_index

Truncation = Literal["drop", "cut_prompt_start", "cut_reply"]

# In these turns a control token is plain text, as a user may write one; in all others it is a fault.
PROMPT_ROLES = ("user", "tool")
# Where a control token of such a turn is cut, so that it is tokenized as words: a character that no text holds.
SEAM = "\ufdd0"


def load_chat_template(
    tokenizer: PreTrainedTokenizerBase, template_name: str | None, thinking: Thinking | None = None
) -> ChatTemplate:
    """The named template, or the tokenizer's own, as --thinking changes it; set on the tokenizer and saved with it.

    Raises UserError when there is none or it cannot be so changed, or when the token that ends a reply is none of the
    tokenizer's tokens.
    """
    thinking = thinking_of_name(template_name, thinking)
    if template_name is not None:
        tokenizer.chat_template = named_template(template_name)
    elif tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template: name one with --template_name "
            f"(one of {', '.join(TEMPLATES)})"
        )
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} runs in Python and gives no character offsets, which the "
            "loss mask needs: convert it to a fast tokenizer (tokenizer.json)"
        )
    name, is_own = template_name or tokenizer.name_or_path, template_name is None
    render = partial(_render, tokenizer, is_own)
    if thinking:
        tokenizer.chat_template = template_for(thinking, tokenizer.get_chat_template(), render, name)
    chat_template = ChatTemplate(
        name=name,
        render=render,
        special_tokens=sorted({str(token) for token in tokenizer.added_tokens_decoder.values()}),
        control_tokens=sorted({str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}),
        eos_token=tokenizer.eos_token,
        thinking=thinking,
    )
    for token in chat_template.stop_tokens:
        if len(tokenizer.encode(token, add_special_tokens=False)) != 1:
            raise UserError(
                f"--template_name {template_name}: it ends a reply with {token}, which is not one token of the "
                f"tokenizer of {tokenizer.name_or_path}, so the model would never stop; choose the model's template"
            )
    return chat_template


def _render(
    tokenizer: PreTrainedTokenizerBase,
    own_template: bool,
    messages: list[Message],
    tools: list[dict] | None,
    add_generation_prompt: bool,
    jinja: str | None = None,
) -> str:
    """jinja: None for the tokenizer's."""
    if own_template:
        # The models' templates read OpenAI's form, in which a call lies under "function".
        messages = [
            {**message, "tool_calls": [{"type": "function", "function": call} for call in message["tool_calls"]]}
            if message.get("tool_calls")
            else message
            for message in messages
        ]
    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=jinja, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (jinja2.TemplateError, TypeError, OverflowError) as error:
        raise UserError(f"the chat template refuses the dialogue: {error}") from error


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: ChatTemplate,
    messages: list[Message],
    tools: list[dict] | None = None,
) -> list[int]:
    """The prompt's ids for a reply to `messages`: the same as those before that reply in training."""
    ids, _ = _ids_and_offsets(tokenizer, chat_template.prompt(_with_seams(chat_template, messages), tools))
    return ids


def encode_recent(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: ChatTemplate,
    messages: list[Message],
    max_length: int,
    tools: list[dict] | None = None,
) -> tuple[list[int], int]:
    """The ids of a prompt with the system turn and the latest exchanges that fit; the number of turns left out.

    Raises Unusable where the last question alone exceeds `max_length` tokens, or the system prompt or a reply holds a
    control token.
    """
    refuse_control_tokens(chat_template, messages, tools)
    n_system = int(messages[0]["role"] == "system")
    users = [index for index, message in enumerate(messages) if message["role"] == "user"]
    for start in [n_system, *users[1:]]:
        ids = encode_prompt(tokenizer, chat_template, messages[:n_system] + messages[start:], tools)
        if len(ids) <= max_length:
            return ids, start - n_system
    raise Unusable("prompt too long", f"its prompt has {len(ids)} tokens, and there is room for {max(max_length, 0)}")


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, chat_template: ChatTemplate) -> list[int]:
    """The ids at which generation ends: the template's end-of-turn tokens and the tokenizer's own end token."""
    return tokenizer.convert_tokens_to_ids(list(chat_template.stop_tokens))


def turn_token_ids(tokenizer: PreTrainedTokenizerBase, chat_template: ChatTemplate) -> tuple[list[int], list[int]]:
    """The added tokens that the template writes around turns: all of them, and those inside replies."""
    turns = [{"role": role, "content": role} for role in ("user", "assistant")]
    ids, labels = _ids_and_labels(tokenizer, chat_template, turns, None, train_on_inputs=False)
    all_ids, learned = ({token for token in tokens if _is_added(tokenizer, token)} for tokens in (ids, labels))
    return sorted(all_ids), sorted(learned)


def encode_dialogue(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: ChatTemplate,
    messages: list[Message],
    tools: list[dict] | None = None,
    *,
    max_length: int,
    truncation: Truncation = "drop",
    train_on_inputs: bool = False,
) -> tuple[list[int], list[int]]:
    """Ids and labels of a dialogue, both of the same length, at most `max_length` tokens.

    Args:
        truncation: for a dialogue over the limit. "drop" refuses it. "cut_prompt_start" leaves out the oldest
            exchanges, then the start of the one user message left; the system prompt and the last reply stay whole.
            "cut_reply" cuts the end, and the reply there gets no end token: one would teach to stop mid-sentence.
        train_on_inputs: learn every token instead of the replies only.

    Raises:
        Unusable: nothing can be learned from it within the limit, or its system prompt or a reply holds a control
            token.
        UserError: the template cannot render it.
    """
    refuse_control_tokens(chat_template, messages, tools)
    _refuse_lone_thoughts(chat_template, messages)
    ids, labels = _ids_and_labels(tokenizer, chat_template, messages, tools, train_on_inputs)
    if len(ids) <= max_length:
        return ids, labels
    if truncation == "drop":
        raise Unusable("too long", f"{len(ids)} tokens, over --model_max_length {max_length}")
    if truncation == "cut_reply":
        ids, labels = ids[:max_length], labels[:max_length]
        if all(label == IGNORED_LABEL for label in labels):
            raise Unusable("prompt too long", f"no reply begins within --model_max_length {max_length}")
        return ids, labels
    while len(ids) > max_length:
        messages = shorten_prompt(tokenizer, messages, n_excess=len(ids) - max_length)
        if messages is None:
            raise Unusable(
                "reply too long", f"with its system prompt it is over --model_max_length {max_length}; raise the limit"
            )
        ids, labels = _ids_and_labels(tokenizer, chat_template, messages, tools, train_on_inputs)
    if all(label == IGNORED_LABEL for label in labels):
        raise Unusable("prompt too long", "of the replies that fit the limit, all have the weight 0")
    return ids, labels


def n_thoughts_left_out(chat_template: ChatTemplate, messages: list[Message], tools: list[dict] | None) -> int:
    """How many of the learned replies begin with a thought of which nothing is learned."""
    thoughts = [
        split_reply(message["content"]).thought
        for message in messages
        if message["role"] == "assistant" and message.get("weight") != 0
    ]
    if not any(thoughts):
        return 0
    segments = chat_template.segments(messages, tools, only_learned=True)
    replies = [segment.text for segment in segments if segment.learned]
    return sum(
        any(part not in reply for part in thought.split("\n\n"))
        for thought, reply in zip(thoughts, replies, strict=True)
    )


def _refuse_lone_thoughts(chat_template: ChatTemplate, messages: list[Message]) -> None:
    """Raise Unusable where a reply has no answer behind its thought.

    Without --thinking only where the template takes a thought that does not end for words, and puts an empty one
    before it.
    """
    for number, message in enumerate(messages, 1):
        if message["role"] != "assistant" or message.get("tool_calls") or not message["content"]:
            continue
        _, answer, is_closed = split_reply(message["content"])
        if not answer and (chat_template.thinking or (not is_closed and chat_template.writes_empty_thoughts)):
            raise Unusable(
                "thought without answer",
                f"message {number} (assistant) is a thought alone, which teaches to end without an answer; write it "
                "behind </think>, or delete the record",
            )


def refuse_control_tokens(chat_template: ChatTemplate, messages: list[Message], tools: list[dict] | None) -> None:
    """Raise Unusable where a system prompt, a reply or the tools hold a token that only the template may write."""
    located = [(f"message {number} ({message['role']})", message) for number, message in enumerate(messages, 1)]
    checked = [(where, message) for where, message in located if message["role"] not in PROMPT_ROLES]
    for where, value in [*checked, ("the list of tools", tools)]:
        token = chat_template.control_token_in(json.dumps(value, ensure_ascii=False))
        if token:
            raise Unusable(
                "control token",
                f"{where} holds {token}, which the model takes for the mark of a turn and not for words; take it out",
            )


def _with_seams(chat_template: ChatTemplate, messages: list[Message]) -> list[Message]:
    return [
        message | {"content": chat_template.cut_control_tokens(message["content"], SEAM)}
        if message["role"] in PROMPT_ROLES
        else message
        for message in messages
    ]


def _ids_and_offsets(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a rendered text and the characters of each; no token crosses a seam."""
    ids, offsets, start = [], [], 0
    for part in text.split(SEAM):
        encoded = tokenizer(part, add_special_tokens=False, return_offsets_mapping=True)
        ids += encoded["input_ids"]
        offsets += [(first + start, end + start) for first, end in encoded["offset_mapping"]]
        start += len(part) + len(SEAM)
    return ids, offsets


def _ids_and_labels(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: ChatTemplate,
    messages: list[Message],
    tools: list[dict] | None,
    train_on_inputs: bool,
) -> tuple[list[int], list[int]]:
    segments = chat_template.segments(_with_seams(chat_template, messages), tools, only_learned=not train_on_inputs)
    are_learned = [message.get("weight") != 0 for message in messages if message["role"] == "assistant"]
    text = "".join(segment.text for segment in segments)
    ids, offsets = _ids_and_offsets(tokenizer, text)
    if train_on_inputs and all(are_learned):
        labels = list(ids)
    else:
        labels = [IGNORED_LABEL] * len(ids)
        replies = iter(are_learned if train_on_inputs else [True] * sum(are_learned))
        # The first token that starts at or behind a character; the tokens of one emoji all start at it.
        token, end = 0, 0
        for segment in segments:
            first, end = token, end + len(segment.text)
            token = bisect_left(offsets, (end,))
            joined = text[end : offsets[token - 1][1]] if token > first else ""
            # Phi's tokens take the blanks behind them, whatever these belong to: no other token hangs on that.
            if joined and not (joined.isspace() and _is_added(tokenizer, ids[token - 1])):
                advice = "change its first or last characters"
                if opens_thought(text[:end]):
                    advice = "the prompt opens a thought that it lacks, so write one, or ask with --thinking empty"
                raise Unusable(
                    "merged token",
                    f"the tokenizer joins {text[end - 5 : end]!r} and {text[end : end + 5]!r}, so a reply has no "
                    f"exact border; {advice}",
                )
            is_learned = next(replies) if segment.learned else train_on_inputs
            if is_learned:
                labels[first:token] = ids[first:token]
    labels[0] = IGNORED_LABEL  # nothing predicts the first token
    return ids, labels


def _is_added(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bool:
    return token_id in tokenizer.added_tokens_decoder


def shorten_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message], n_excess: int) -> list[Message] | None:
    """Drop the oldest exchange, or cut the only user message at its start; None if nothing would be left."""
    users = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if len(users) > 1:
        return messages[: users[0]] + messages[users[1] :]
    content = messages[users[0]]["content"]
    offsets = tokenizer(content, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if n_excess >= len(offsets):
        return None
    # A character may be several tokens, or one token several characters: the cut falls between both.
    dropped_end = offsets[n_excess - 1][1]
    kept_start = next((start for start, _ in offsets[n_excess:] if start >= dropped_end), len(content))
    kept = content[kept_start:].strip()
    if not kept:
        return None
    return [*messages[: users[0]], {"role": "user", "content": kept}, *messages[users[0] + 1 :]]


def mark_learned(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], labels: Sequence[int]) -> str:
    """The text of an example with its learned tokens between guillemets, for the log."""
    parts = []
    for learned, group in groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED_LABEL):
        text = tokenizer.decode([token for token, _ in group])
        parts.append(f"«{text}»" if learned else text)
    return "".join(parts)


def encode_replies(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: ChatTemplate,
    messages: list[Message],
    replies: Sequence[str],
    tools: list[dict] | None = None,
    *,
    max_prompt_length: int,
    max_reply_length: int,
) -> tuple[list[int], list[list[int]], int]:
    """Ids of a prompt and of each reply to it within the limits, and how many replies were cut (no end token).

    The prompt's ids are those before a reply in `encode_dialogue`, so prompt + reply is what SFT learns.

    Raises Unusable where nothing would be left of the prompt, or a reply or the system prompt holds a control token.
    """
    for reply in replies:
        whole = [*messages, {"role": "assistant", "content": reply}]
        refuse_control_tokens(chat_template, whole, tools)
        _refuse_lone_thoughts(chat_template, whole)
    while True:
        prompt_ids, first_ids = encode_exchange(tokenizer, chat_template, messages, replies[0], tools)
        if len(prompt_ids) <= max_prompt_length:
            break
        messages = shorten_prompt(tokenizer, messages, len(prompt_ids) - max_prompt_length)
        if messages is None:
            raise Unusable("prompt too long", f"{len(prompt_ids)} tokens, over --max_source_length {max_prompt_length}")
    whole = [first_ids]
    for reply in replies[1:]:
        same_prompt_ids, reply_ids = encode_exchange(tokenizer, chat_template, messages, reply, tools)
        assert same_prompt_ids == prompt_ids, "a reply changed the ids of its prompt"
        whole.append(reply_ids)
    n_cut = sum(len(ids) > max_reply_length for ids in whole)
    return prompt_ids, [ids[:max_reply_length] for ids in whole], n_cut


def encode_exchange(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: ChatTemplate,
    messages: list[Message],
    reply: str,
    tools: list[dict] | None = None,
    *,
    ended: bool = True,
) -> tuple[list[int], list[int]]:
    """Ids of the prompt, and of the reply with its end token, as SFT learns and a reward model scores them.

    ended: False for a reply that was cut, which has no end token, as where training cuts one.
    """
    if not ended:
        return _encode_cut_exchange(tokenizer, chat_template, messages, reply, tools)
    ids, labels = _ids_and_labels(
        tokenizer,
        chat_template,
        [*unlearned(messages), {"role": "assistant", "content": reply}],
        tools,
        train_on_inputs=False,
    )
    end = max(index for index, label in enumerate(labels) if label != IGNORED_LABEL) + 1
    start = end
    while labels[start - 1] != IGNORED_LABEL:
        start -= 1
    return ids[:start], ids[start:end]


def _encode_cut_exchange(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: ChatTemplate,
    messages: list[Message],
    reply: str,
    tools: list[dict] | None,
) -> tuple[list[int], list[int]]:
    """`encode_exchange` for a reply that was cut, possibly inside its thought."""
    is_open = "<think>" in reply and "</think>" not in reply.rpartition("<think>")[2]
    if is_open and not chat_template.prompt(messages, tools).rstrip().endswith("</think>"):
        # A template takes an open thought for words, and puts an empty one before it; so it is closed, and cut again.
        reply += "\n</think>\n\n"
    prompt_ids, _ = encode_exchange(tokenizer, chat_template, messages, reply, tools)
    messages_with_seams = _with_seams(chat_template, [*unlearned(messages), {"role": "assistant", "content": reply}])
    segments = chat_template.segments(messages_with_seams, tools, only_learned=True)
    last = max(index for index, segment in enumerate(segments) if segment.learned)
    text = segments[last].text
    end_token = next(token for token in chat_template.stop_tokens if text.endswith(token))
    # Whatever the template closes a thought with stands behind its last words.
    words = split_reply(reply).thought.rpartition("\n")[2] if is_open else ""
    before, closing, _ = text.rpartition(words or "</think>")
    cut = before + words if words else before.rstrip()
    text = cut if is_open and closing else text.removesuffix(end_token)
    ids, _ = _ids_and_offsets(tokenizer, "".join(segment.text for segment in segments[:last]) + text)
    return prompt_ids, ids[len(prompt_ids) :]
