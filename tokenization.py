"""From a record to token ids and labels: what the model reads, which tokens carry loss, what happens at the limit.

Training renders a dialogue with the chat template and tokenizes the whole text once, as a server does; the template's
segments say which characters are replies, the tokenizer's offsets which tokens those are. Learned are exactly the
replies and the token that ends each. This is the only module that writes the ignored label.
"""

import hashlib
import json
import os
import re
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import Literal

import jinja2
import numpy as np
from datasets import Dataset, Features, Value
from datasets import List as ListFeature
from transformers import PreTrainedTokenizerBase

import dialects
import record_keys
import record_values
import records
import template
from errors import Unusable, UserError
from record_keys import Reading
from records import (
    BadRecord,
    Dialogue,
    Document,
    Pair,
    Report,
    cached_part,
    load_dialogues,
    load_documents,
    load_pairs,
    load_prompts,
)
from template import ChatTemplate, Message

IGNORED_LABEL = -100  # torch.nn.functional.cross_entropy's ignore_index

# Why a sound dialogue is left out, always counted; every other reason is a fault that --on_bad_data decides about.
OVER_LIMIT = ("too long", "prompt too long", "reply too long", "same within the limit", "same prompt")

_IDS, _LENGTH, _TEXT = ListFeature(Value("int32")), Value("int32"), Value("string")
DIALOGUE_FEATURES = Features(
    input_ids=_IDS, labels=_IDS, length=_LENGTH, n_thoughts_left_out=_LENGTH, source=_TEXT, fault=_TEXT
)
DOCUMENT_FEATURES = Features(input_ids=_IDS, length=_LENGTH, source=_TEXT, fault=_TEXT)
# `length` is that of the longer of prompt + reply; `margin` is NaN where the data has none.
PAIR_FEATURES = Features(
    prompt_ids=_IDS,
    chosen_ids=_IDS,
    rejected_ids=_IDS,
    margin=Value("float32"),
    n_cut=_LENGTH,
    length=_LENGTH,
    source=_TEXT,
    fault=_TEXT,
)
PROMPT_FEATURES = Features(prompt_ids=_IDS, messages=_TEXT, reply=_TEXT, length=_LENGTH, source=_TEXT, fault=_TEXT)
BLOCK_FEATURES = Features(input_ids=_IDS, labels=_IDS, seq_lengths=_IDS, length=_LENGTH, source=ListFeature(_TEXT))

Truncation = Literal["drop", "cut_prompt_start", "cut_reply"]

# Counted of replies before the last, whose thoughts many templates leave out.
LEFT_OUT_THOUGHTS = "thoughts of earlier replies, left out by the template while the replies are learned"

# In these turns a control token is words, as somebody may write it in a question; in all others it is a fault.
ASKING = ("user", "tool")
# Where a control token of such a turn is cut, so that it is tokenized as words: a character that no text holds.
SEAM = "\ufdd0"


# ---------------------------------------------------------------- template and prompt


def load_chat_template(tokenizer: PreTrainedTokenizerBase, template_name: str | None) -> ChatTemplate:
    """The named template, or the tokenizer's own; a named one replaces the tokenizer's, so that it is saved with it.

    Raises UserError when there is none, or when the token that ends a reply is none of the tokenizer's tokens.
    """
    if template_name is not None:
        tokenizer.chat_template = template.named_template(template_name)
    elif tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template: name one with --template_name "
            f"(one of {', '.join(template.TEMPLATES)})"
        )
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} runs in Python and gives no character offsets, which the "
            "loss mask needs: convert it to a fast tokenizer (tokenizer.json)"
        )
    chat_template = ChatTemplate(
        name=template_name or tokenizer.name_or_path,
        render=partial(_render, tokenizer, template_name is None),
        special_tokens=sorted({str(token) for token in tokenizer.added_tokens_decoder.values()}),
        control_tokens=sorted({str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}),
        eos_token=tokenizer.eos_token,
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
) -> str:
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
            messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (jinja2.TemplateError, TypeError, OverflowError) as error:
        raise UserError(f"the chat template refuses the dialogue: {error}") from error


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: ChatTemplate,
    messages: list[Message],
    tools: list[dict] | None = None,
) -> list[int]:
    """The ids that a reply to `messages` continues: the same as those before that reply in training."""
    ids, _ = _ids_and_offsets(tokenizer, chat_template.prompt(_with_seams(chat_template, messages), tools))
    return ids


def encode_recent(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: ChatTemplate,
    messages: list[Message],
    max_length: int,
    tools: list[dict] | None = None,
) -> tuple[list[int], int]:
    """The prompt's ids with the system turn and the latest exchanges that fit, and the number of turns left out.

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
    """The added tokens that the template writes around turns: all of them, and those that replies are made of."""
    turns = [{"role": role, "content": role} for role in ("user", "assistant")]
    ids, labels = _ids_and_labels(tokenizer, chat_template, turns, None, train_on_inputs=False)
    all_ids, learned = ({token for token in tokens if _is_added(tokenizer, token)} for tokens in (ids, labels))
    return sorted(all_ids), sorted(learned)


# ---------------------------------------------------------------- one dialogue


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
        messages = _shorten_prompt(tokenizer, messages, n_excess=len(ids) - max_length)
        if messages is None:
            raise Unusable(
                "reply too long", f"with its system prompt it is over --model_max_length {max_length}; raise the limit"
            )
        ids, labels = _ids_and_labels(tokenizer, chat_template, messages, tools, train_on_inputs)
    if all(label == IGNORED_LABEL for label in labels):
        raise Unusable("prompt too long", "of the replies that fit the limit, all have the weight 0")
    return ids, labels


def n_thoughts_left_out(chat_template: ChatTemplate, messages: list[Message], tools: list[dict] | None) -> int:
    """How many replies begin with `<think>...</think>` of which the template writes none."""
    thoughts = [thought_of(message["content"]) for message in messages if message["role"] == "assistant"]
    if not any(thoughts):
        return 0
    replies = [segment.text for segment in chat_template.segments(messages, tools) if segment.learned]
    return sum(thought not in reply for thought, reply in zip(thoughts, replies, strict=True))


def thought_of(reply: str) -> str:
    """What a reply says between <think> and </think>, "" without."""
    before, end, _ = reply.partition("</think>")
    return before.rpartition("<think>")[2].strip() if end else ""


def refuse_control_tokens(chat_template: ChatTemplate, messages: list[Message], tools: list[dict] | None) -> None:
    """Raise Unusable where a system prompt, a reply or the tools hold a token that only the template may write."""
    said = [(f"message {number} ({message['role']})", message) for number, message in enumerate(messages, 1)]
    checked = [(where, message) for where, message in said if message["role"] not in ASKING]
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
        if message["role"] in ASKING
        else message
        for message in messages
    ]


def _ids_and_offsets(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a rendered text, of which none reaches over a seam, and the characters that each stands for."""
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
    segments = chat_template.segments(_with_seams(chat_template, messages), tools)
    are_learned = [message.get("weight") != 0 for message in messages if message["role"] == "assistant"]
    text = "".join(segment.text for segment in segments)
    ids, offsets = _ids_and_offsets(tokenizer, text)
    if train_on_inputs and all(are_learned):
        labels = list(ids)
    else:
        labels = [IGNORED_LABEL] * len(ids)
        replies = iter(are_learned)
        # The first token that starts at or behind a character; the tokens of one emoji all start at it.
        token, end = 0, 0
        for segment in segments:
            first, end = token, end + len(segment.text)
            token = bisect_left(offsets, (end,))
            joined = text[end : offsets[token - 1][1]] if token > first else ""
            # Phi's tokens take the blanks behind them, whatever these belong to: no other token hangs on that.
            if joined and not (joined.isspace() and _is_added(tokenizer, ids[token - 1])):
                raise Unusable(
                    "merged token",
                    f"the tokenizer joins {text[end - 5 : end]!r} and {text[end : end + 5]!r}, so a reply has no "
                    "exact border; change its first or last characters",
                )
            is_learned = next(replies) if segment.learned else train_on_inputs
            if is_learned:
                labels[first:token] = ids[first:token]
    labels[0] = IGNORED_LABEL  # nothing predicts the first token
    return ids, labels


def _is_added(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bool:
    return token_id in tokenizer.added_tokens_decoder


def _shorten_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message], n_excess: int) -> list[Message] | None:
    """The dialogue without its oldest exchange, or with one user message cut at its start; None if all is cut."""
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


# ---------------------------------------------------------------- many dialogues


def tokenize_dialogues(
    dialogues: Sequence[Dialogue],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: ChatTemplate,
    *,
    max_length: int,
    truncation: Truncation,
    train_on_inputs: bool,
    num_workers: int,
    on_bad_data: Literal["error", "drop"] = "error",
) -> tuple[Dataset, Report]:
    """A dataset of `input_ids`, `labels`, `length` and `source` ("file:line"), and what was left out and why.

    Raises UserError under "error" for a dialogue that has a fault and is not just over the limit.
    """
    texts = [json.dumps([d.messages, d.tools], ensure_ascii=False) for d in dialogues]
    rows = Dataset.from_dict({"dialogue": texts, "source": [d.source for d in dialogues]})
    encode = partial(
        encode_dialogue,
        tokenizer,
        chat_template,
        max_length=max_length,
        truncation=truncation,
        train_on_inputs=train_on_inputs,
    )
    count = partial(n_thoughts_left_out, chat_template)
    rows = _map_batches(rows, partial(_encode_batch, encode, count), num_workers, "dialogue", DIALOGUE_FEATURES)
    rows, report = _without_faults(rows, "dialogues", on_bad_data)
    notes = Reading()
    for n_left_out, source in zip(rows["n_thoughts_left_out"], rows["source"], strict=True):
        for _ in range(n_left_out):
            notes.note(LEFT_OUT_THOUGHTS, source)
    report.notes = notes.lines()
    return rows.remove_columns("n_thoughts_left_out"), report


def _encode_batch(encode: Callable, count_left_out: Callable, batch: dict[str, list]) -> dict[str, list]:
    """`datasets` maps this over batches: every row stays, one that gives no example says why in `fault`."""
    names = ("input_ids", "labels", "length", "n_thoughts_left_out", "fault")
    columns = {name: [] for name in names} | {"source": batch["source"]}
    for text in batch["dialogue"]:
        messages, tools = json.loads(text)
        ids, labels, n_left_out, fault = [], [], 0, ""
        try:
            ids, labels = encode(messages, tools)
            n_left_out = count_left_out(messages, tools)
        except Unusable as unusable:
            fault = f"{unusable.reason}\t{unusable.detail}"
        except UserError as error:
            fault = f"not renderable\t{error}"
        columns["input_ids"].append(ids)
        columns["labels"].append(labels)
        columns["length"].append(len(ids))
        columns["n_thoughts_left_out"].append(n_left_out)
        columns["fault"].append(fault)
    return columns


def cached_dialogues(
    part: Literal["train", "eval"],
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: ChatTemplate,
    cache_dir: str | Path,
    *,
    max_length: int,
    truncation: Truncation,
    train_on_inputs: bool,
    **options,
) -> tuple[Dataset, Report, Report, bool]:
    """`cached_part` of the rows of `tokenize_dialogues`, with its other options.

    The stage and the tool that fills its cache beforehand both call this, so that they cannot disagree on the key.
    """
    limits = {"max_length": max_length, "truncation": truncation, "train_on_inputs": train_on_inputs}
    settings = limits | {"rows": "dialogues", "tokenizer": tokenizer_fingerprint(tokenizer)}
    tokenize = partial(tokenize_dialogues, tokenizer=tokenizer, chat_template=chat_template, **limits)
    return cached_part(part, files, load_dialogues, tokenize, settings, cache_dir, **options)


def token_length(
    record: Dialogue | Document, tokenizer: PreTrainedTokenizerBase, chat_template: ChatTemplate | None
) -> int:
    """Tokens of a whole record as its stage learns it.

    Raises Unusable where `tokenize_dialogues` or `tokenize_documents` would call it a fault.
    """
    if isinstance(record, Document):
        encoded = encode_documents(tokenizer, {"text": [record.text], "source": [record.source]})
        if encoded["fault"][0]:
            raise Unusable(*encoded["fault"][0].split("\t", 1))
        return encoded["length"][0]
    try:
        ids, _ = encode_dialogue(tokenizer, chat_template, record.messages, record.tools, max_length=sys.maxsize)
    except UserError as error:
        raise Unusable("not renderable", str(error)) from None
    return len(ids)


def pair_lengths(pair: Pair, tokenizer: PreTrainedTokenizerBase, chat_template: ChatTemplate) -> tuple[int, int]:
    """Tokens of the whole prompt, and of the longer reply with its end token; Unusable for a fault."""
    whole = {"max_prompt_length": sys.maxsize, "max_reply_length": sys.maxsize}
    try:
        prompt_ids, *replies, _ = encode_pair(
            tokenizer, chat_template, pair.messages, pair.chosen, pair.rejected, pair.tools, **whole
        )
    except UserError as error:
        raise Unusable("not renderable", str(error)) from None
    return len(prompt_ids), max(map(len, replies))


# ---------------------------------------------------------------- preference pairs


def tokenize_pairs(
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: ChatTemplate,
    *,
    max_prompt_length: int,
    max_reply_length: int,
    num_workers: int,
    on_bad_data: Literal["error", "drop"] = "error",
) -> tuple[Dataset, Report]:
    """A dataset of PAIR_FEATURES without `fault`, and what was left out and why.

    A prompt over its limit loses its oldest exchanges, then the start of the question; a reply over its limit is
    cut and gets no end token. Raises UserError under "error" for a pair that has a fault.
    """
    rows = Dataset.from_dict(
        {
            "pair": [json.dumps([p.messages, p.chosen, p.rejected, p.tools], ensure_ascii=False) for p in pairs],
            "margin": [float("nan") if p.margin is None else p.margin for p in pairs],
            "source": [p.source for p in pairs],
        }
    )
    limits = {"max_prompt_length": max_prompt_length, "max_reply_length": max_reply_length}
    encode = partial(_encode_pairs, partial(encode_pair, tokenizer, chat_template, **limits))
    rows = _map_batches(rows, encode, num_workers, "pair", PAIR_FEATURES)
    return _without_faults(rows, "pairs", on_bad_data)


def encode_pair(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: ChatTemplate,
    messages: list[Message],
    chosen: str,
    rejected: str,
    tools: list[dict] | None = None,
    *,
    max_prompt_length: int,
    max_reply_length: int,
) -> tuple[list[int], list[int], list[int], int]:
    """Ids of the prompt and of both replies with their end tokens, within the limits; how many replies were cut.

    The prompt's ids are those before a reply in `encode_dialogue`, so prompt + reply is what SFT learns.

    Raises:
        Unusable: the prompt cannot be brought within the limit, the replies are the same within theirs, or one of
            them or the system prompt holds a control token.
    """
    for reply in (chosen, rejected):
        refuse_control_tokens(chat_template, [*messages, {"role": "assistant", "content": reply}], tools)
    while True:
        prompt_ids, chosen_ids = encode_exchange(tokenizer, chat_template, messages, chosen, tools)
        n_excess = len(prompt_ids) - max_prompt_length
        if n_excess <= 0:
            break
        shorter = _shorten_prompt(tokenizer, messages, n_excess)
        if shorter is None:
            raise Unusable("prompt too long", f"{len(prompt_ids)} tokens, over --max_source_length {max_prompt_length}")
        messages = shorter
    rejected_prompt_ids, rejected_ids = encode_exchange(tokenizer, chat_template, messages, rejected, tools)
    assert rejected_prompt_ids == prompt_ids, "a reply changed the ids of its prompt"
    n_cut = (len(chosen_ids) > max_reply_length) + (len(rejected_ids) > max_reply_length)
    chosen_ids, rejected_ids = chosen_ids[:max_reply_length], rejected_ids[:max_reply_length]
    if chosen_ids == rejected_ids:
        raise Unusable(
            "same within the limit", f"both replies begin with the same --max_target_length {max_reply_length} tokens"
        )
    return prompt_ids, chosen_ids, rejected_ids, n_cut


def encode_exchange(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: ChatTemplate,
    messages: list[Message],
    reply: str,
    tools: list[dict] | None = None,
    *,
    ended: bool = True,
) -> tuple[list[int], list[int]]:
    """Ids before the reply, and of the reply with its end token: what SFT learns and a reward model scores.

    ended: False for a reply that was cut, which has no end token, as where training cuts one.
    """
    if not ended:
        return _encode_cut_exchange(tokenizer, chat_template, messages, reply, tools)
    ids, labels = _ids_and_labels(
        tokenizer, chat_template, [*messages, {"role": "assistant", "content": reply}], tools, train_on_inputs=False
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
    """`encode_exchange` of a reply that was cut, in its words or in a thought."""
    is_open = "<think>" in reply and "</think>" not in reply.rpartition("<think>")[2]
    if is_open and not chat_template.prompt(messages, tools).rstrip().endswith("</think>"):
        # A template takes an open thought for words, and puts an empty one before it; so it is closed, and cut again.
        reply += "\n</think>\n\n"
    prompt_ids, _ = encode_exchange(tokenizer, chat_template, messages, reply, tools)
    said = _with_seams(chat_template, [*messages, {"role": "assistant", "content": reply}])
    segments = chat_template.segments(said, tools)
    last = max(index for index, segment in enumerate(segments) if segment.learned)
    text = segments[last].text
    end_token = next(token for token in chat_template.stop_tokens if text.endswith(token))
    thought, closing, _ = text.rpartition("</think>")
    text = thought.rstrip() if is_open and closing else text.removesuffix(end_token)
    ids, _ = _ids_and_offsets(tokenizer, "".join(segment.text for segment in segments[:last]) + text)
    return prompt_ids, ids[len(prompt_ids) :]


def _encode_pairs(encode: Callable, batch: dict[str, list]) -> dict[str, list]:
    """`datasets` maps this over batches: every row stays, one that gives no example says why in `fault`."""
    rows = []
    for text in batch["pair"]:
        fault, prompt_ids, chosen_ids, rejected_ids, n_cut = "", [], [], [], 0
        try:
            prompt_ids, chosen_ids, rejected_ids, n_cut = encode(*json.loads(text))
        except Unusable as unusable:
            fault = f"{unusable.reason}\t{unusable.detail}"
        except UserError as error:
            fault = f"not renderable\t{error}"
        longest = len(prompt_ids) + max(len(chosen_ids), len(rejected_ids))
        rows.append((prompt_ids, chosen_ids, rejected_ids, n_cut, longest, fault))
    columns = ("prompt_ids", "chosen_ids", "rejected_ids", "n_cut", "length", "fault")
    encoded = dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True))
    return encoded | {"margin": batch["margin"], "source": batch["source"]}


def cached_pairs(
    part: Literal["train", "eval"],
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: ChatTemplate,
    cache_dir: str | Path,
    *,
    max_prompt_length: int,
    max_reply_length: int,
    **options,
) -> tuple[Dataset, Report, Report, bool]:
    """`cached_part` of the rows of `tokenize_pairs`, with its other options."""
    limits = {"max_prompt_length": max_prompt_length, "max_reply_length": max_reply_length}
    settings = limits | {"rows": "pairs", "tokenizer": tokenizer_fingerprint(tokenizer)}
    tokenize = partial(tokenize_pairs, tokenizer=tokenizer, chat_template=chat_template, **limits)
    return cached_part(part, files, load_pairs, tokenize, settings, cache_dir, **options)


def describe_pairs(dataset: Dataset, max_reply_length: int) -> str:
    """The tokens of the rows of `tokenize_pairs`, in words."""
    n_cut = sum(dataset["n_cut"])
    cut = f", {n_cut} of {2 * len(dataset)} replies cut at {max_reply_length}" if n_cut else ""
    return f"the longest prompt and reply {max(dataset['length'])}{cut}"


# ---------------------------------------------------------------- prompts to answer


def tokenize_prompts(
    dialogues: Sequence[Dialogue],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: ChatTemplate,
    *,
    max_prompt_length: int,
    truncation: Literal["drop", "cut_prompt_start"],
    num_workers: int,
    on_bad_data: Literal["error", "drop"] = "error",
) -> tuple[Dataset, Report]:
    """The prompt before each answer to a user's turn, with its history, each prompt once; what was left out and why.

    A dialogue that ends with the user asks too. Rows of `prompt_ids`, `messages` (JSON of the messages that these ids
    stand for, and the tools), `reply` (the dialogue's own answer, "" without), `length` and `source`.
    "cut_prompt_start" leaves out the oldest exchanges of a prompt over the limit, then the start of its question.
    """
    prompts = [
        ([dialogue.messages[: index + 1], dialogue.tools, reply["content"]], dialogue.source)
        for dialogue in dialogues
        for index, (message, reply) in enumerate(pairwise([*dialogue.messages, {"role": "", "content": ""}]))
        if message["role"] == "user"
    ]
    rows = Dataset.from_dict(
        {
            "prompt": [json.dumps(prompt, ensure_ascii=False) for prompt, _ in prompts],
            "source": [source for _, source in prompts],
        }
    )
    encode = partial(_encode_prompts, tokenizer, chat_template, max_prompt_length, truncation)
    rows = _map_batches(rows, encode, num_workers, "prompt", PROMPT_FEATURES)
    first: dict[tuple[int, ...], str] = {}
    faults = []
    for ids, source, fault in zip(rows["prompt_ids"], rows["source"], rows["fault"], strict=True):
        if not fault and tuple(ids) in first:
            fault = f"same prompt\tas {first[tuple(ids)]}"
        elif not fault:
            first[tuple(ids)] = source
        faults.append(fault)
    rows = rows.remove_columns("fault").add_column("fault", faults)
    return _without_faults(rows, "prompts", on_bad_data)


def _encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: ChatTemplate,
    max_length: int,
    truncation: Literal["drop", "cut_prompt_start"],
    batch: dict[str, list],
) -> dict[str, list]:
    """`datasets` maps this over batches: every row stays, one that gives no prompt says why in `fault`."""
    columns = {"prompt_ids": [], "messages": [], "reply": [], "length": [], "source": batch["source"], "fault": []}
    for text in batch["prompt"]:
        (messages, tools, reply), ids, fault = json.loads(text), [], ""
        try:
            refuse_control_tokens(chat_template, messages, tools)
            ids = encode_prompt(tokenizer, chat_template, messages, tools)
            while len(ids) > max_length:
                shorter = None
                if truncation == "cut_prompt_start":
                    shorter = _shorten_prompt(tokenizer, messages, n_excess=len(ids) - max_length)
                if shorter is None:
                    raise Unusable("prompt too long", f"{len(ids)} tokens, over --max_source_length {max_length}")
                messages = shorter
                ids = encode_prompt(tokenizer, chat_template, messages, tools)
        except Unusable as unusable:
            ids, fault = [], f"{unusable.reason}\t{unusable.detail}"
        except UserError as error:
            ids, fault = [], f"not renderable\t{error}"
        columns["prompt_ids"].append(ids)
        columns["messages"].append(json.dumps([messages, tools], ensure_ascii=False))
        columns["reply"].append(reply)
        columns["length"].append(len(ids))
        columns["fault"].append(fault)
    return columns


def cached_prompts(
    part: Literal["train", "eval"],
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: ChatTemplate,
    cache_dir: str | Path,
    *,
    max_prompt_length: int,
    truncation: Literal["drop", "cut_prompt_start"],
    **options,
) -> tuple[Dataset, Report, Report, bool]:
    """`cached_part` of the rows of `tokenize_prompts`, with its other options."""
    limits = {"max_prompt_length": max_prompt_length, "truncation": truncation}
    settings = limits | {"rows": "prompts", "tokenizer": tokenizer_fingerprint(tokenizer)}
    tokenize = partial(tokenize_prompts, tokenizer=tokenizer, chat_template=chat_template, **limits)
    return cached_part(part, files, load_prompts, tokenize, settings, cache_dir, **options)


# ---------------------------------------------------------------- documents of continued pretraining


def document_end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token behind each document: Qwen's <|endoftext|> where there is one, since its chat models end turns by eos.

    Raises UserError where the tokenizer has no end token at all.
    """
    added = {str(token): token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
    end_id = added.get("<|endoftext|>", tokenizer.eos_token_id)
    if end_id is None:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no end token to join documents by")
    return end_id


def tokenize_documents(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_workers: int,
    on_bad_data: Literal["error", "drop"] = "error",
) -> tuple[Dataset, Report]:
    """A dataset of `input_ids` (each document with its end token), `length` and `source`, and what was left out.

    Raises UserError under "error" for a document that holds a control token, such as one that ends a turn.
    """
    rows = Dataset.from_dict({"text": [d.text for d in documents], "source": [d.source for d in documents]})
    rows = _map_batches(rows, partial(encode_documents, tokenizer), num_workers, "text", DOCUMENT_FEATURES)
    return _without_faults(rows, "documents", on_bad_data)


def encode_documents(tokenizer: PreTrainedTokenizerBase, batch: dict[str, list]) -> dict[str, list]:
    """Columns `text` and `source` to `input_ids`, `length`, `source` and `fault`; a faulty text has no ids."""
    control_tokens = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    end_id = document_end_id(tokenizer)
    columns = {"input_ids": [], "length": [], "source": batch["source"], "fault": []}
    encoded = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False)["input_ids"]
    for text, ids in zip(batch["text"], encoded, strict=True):
        token = next((token for token in control_tokens if token in text), None)
        fault = f"control token\tit holds {token}, which is no word but a mark; take it out" if token else ""
        ids = [] if fault else [*ids, end_id]
        columns["input_ids"].append(ids)
        columns["length"].append(len(ids))
        columns["fault"].append(fault)
    return columns


def cut_blocks(
    documents: Dataset | dict[str, list], block_size: int, packing_across_documents: bool = False
) -> dict[str, list]:
    """Documents joined in their order and cut into blocks; the last block is what is left, and nothing is lost.

    Args:
        documents: columns `input_ids` and `source`.
        block_size: tokens a block.
        packing_across_documents: attend across the documents of a block. Otherwise each is on its own there
            (`seq_lengths`), and its first token is not learned, since nothing before it could tell.

    Returns:
        Columns `input_ids`, `labels`, `seq_lengths`, `length` and `source` (of every document in the block).
    """
    lengths = np.array([len(ids) for ids in documents["input_ids"]], dtype=np.int64)
    ids = np.concatenate([[], *documents["input_ids"]]).astype(np.int32)
    ends = lengths.cumsum()
    starts = ends - lengths
    columns: dict[str, list] = {"input_ids": [], "labels": [], "seq_lengths": [], "length": [], "source": []}
    for start in range(0, len(ids), block_size):
        block = ids[start : start + block_size]
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(starts, start + len(block), side="left"))
        borders = [0, *(starts[first + 1 : last] - start).tolist()]
        if packing_across_documents:
            borders = [0]
        labels = block.copy()
        labels[borders] = IGNORED_LABEL
        columns["input_ids"].append(block)
        columns["labels"].append(labels)
        columns["seq_lengths"].append(np.diff([*borders, len(block)]).tolist())
        columns["length"].append(len(block))
        columns["source"].append(list(documents["source"][first:last]))
    return columns


def cached_blocks(
    part: Literal["train", "eval"],
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: str | Path,
    *,
    block_size: int,
    packing_across_documents: bool,
    **options,
) -> tuple[Dataset, Report, Report, bool]:
    """`cached_part` of documents joined and cut by `cut_blocks`, with its other options."""
    blocks = {"block_size": block_size, "packing_across_documents": packing_across_documents}

    def tokenize(documents: Sequence[Document], **how) -> tuple[Dataset, Report]:
        tokenized, report = tokenize_documents(documents, tokenizer, **how)
        return Dataset.from_dict(cut_blocks(tokenized.with_format("numpy")[:], **blocks), BLOCK_FEATURES), report

    settings = blocks | {"rows": "blocks", "tokenizer": tokenizer_fingerprint(tokenizer)}
    return cached_part(part, files, load_documents, tokenize, settings, cache_dir, **options)


def learned_bytes_per_token(tokenizer: PreTrainedTokenizerBase, labels: Iterable[Sequence[int]]) -> float:
    """The mean number of UTF-8 bytes that a learned token of these rows of labels stands for."""
    learned = np.concatenate([np.asarray(row) for row in labels])
    return float(token_byte_lengths(tokenizer)[learned[learned != IGNORED_LABEL]].mean())


def token_byte_lengths(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """[vocabulary] UTF-8 bytes that each token stands for; 0 for special tokens."""
    is_byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
    lengths = np.zeros(len(tokenizer), dtype=np.int64)
    for token, token_id in tokenizer.get_vocab().items():
        if is_byte_level:
            lengths[token_id] = len(token)  # one letter of its alphabet a byte
        elif re.fullmatch("<0x[0-9A-F]{2}>", token):
            lengths[token_id] = 1
        else:
            lengths[token_id] = len(token.replace("\u2581", " ").encode())
    for token_id, token in tokenizer.added_tokens_decoder.items():
        lengths[token_id] = 0 if token.special else len(str(token).encode())
    return lengths


# ---------------------------------------------------------------- many rows


def _map_batches(rows: Dataset, encode: Callable, num_workers: int, consumed: str, features: Features) -> Dataset:
    """`rows` through `encode`, a batch at a time, in as many processes as repay their start."""
    # A process costs about a second to start, which a thousand rows do not repay.
    n_processes = max(1, min(num_workers, os.cpu_count() or 1, len(rows) // 1000))
    return rows.map(
        encode,
        batched=True,
        num_proc=n_processes if n_processes > 1 else None,
        remove_columns=[consumed],
        features=features,
        new_fingerprint="not-cached-here",  # hashing a tokenizer takes seconds; records.cached_dataset has the key
        load_from_cache_file=False,
        desc="tokenizing",
    )


def _without_faults(rows: Dataset, what: str, on_bad_data: Literal["error", "drop"]) -> tuple[Dataset, Report]:
    """The rows whose `fault` is empty, and the others counted; raises UserError under "error"."""
    report = Report(read=len(rows))
    usable = []
    for index, (source, fault) in enumerate(zip(rows["source"], rows["fault"], strict=True)):
        if fault:
            report.drop(BadRecord(source, *fault.split("\t", 1)))
        else:
            usable.append(index)
    faults = [line for reason, lines in report.examples.items() if reason not in OVER_LIMIT for line in lines]
    if faults and on_bad_data == "error":
        n_bad = sum(count for reason, count in report.dropped.items() if reason not in OVER_LIMIT)
        hint = "mend them, or go on without them: --on_bad_data drop"
        raise UserError("\n  ".join([f"{n_bad} of {report.read} {what} are bad, such as", *faults]) + f"\n{hint}")
    return rows.select(usable).remove_columns("fault"), report


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over what decides ids: vocabulary, merges, special tokens, chat template, and the code that uses them."""
    whole = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    whole.update(f"{tokenizer.chat_template}\0{tokenizer.eos_token}\0{tokenizer.bos_token}".encode())
    for module in (sys.modules[__name__], records, dialects, record_keys, record_values, template):
        whole.update(Path(module.__file__).read_bytes())
    return whole.hexdigest()
