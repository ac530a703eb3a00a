"""From a record to token ids and labels: what the model reads, which tokens carry loss, what happens at the limit.

Training renders a dialogue with the chat template and tokenizes the whole text once, as a server does; the template's
segments say which characters are replies, the tokenizer's offsets which tokens those are. Learned are exactly the
replies and the token that ends each. This is the only module that writes the ignored label.
"""

import hashlib
import json
import os
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Literal

import jinja2
import numpy as np
from datasets import Dataset, Features, Value
from datasets import List as ListFeature
from transformers import PreTrainedTokenizerBase

import records
import template
from errors import UserError
from records import BadRecord, Dialogue, Document, Report, Unusable
from template import ChatTemplate, Message

IGNORED_LABEL = -100  # torch.nn.functional.cross_entropy's ignore_index

# Why a sound dialogue is left out, always counted; every other reason is a fault that --on_bad_data decides about.
OVER_LIMIT = ("too long", "prompt too long", "reply too long")

_IDS, _LENGTH, _TEXT = ListFeature(Value("int32")), Value("int32"), Value("string")
DIALOGUE_FEATURES = Features(input_ids=_IDS, labels=_IDS, length=_LENGTH, source=_TEXT, fault=_TEXT)
DOCUMENT_FEATURES = Features(input_ids=_IDS, length=_LENGTH, source=_TEXT, fault=_TEXT)
BLOCK_FEATURES = Features(input_ids=_IDS, labels=_IDS, seq_lengths=_IDS, length=_LENGTH, source=ListFeature(_TEXT))

Truncation = Literal["drop", "cut_prompt_start", "cut_reply"]


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
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template refuses the dialogue: {error}") from error


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: ChatTemplate,
    messages: list[Message],
    tools: list[dict] | None = None,
) -> list[int]:
    """The ids that a reply to `messages` continues: the same as those before that reply in training."""
    text = chat_template.prompt(messages, tools)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, chat_template: ChatTemplate) -> list[int]:
    """The ids at which generation ends: the template's end-of-turn tokens and the tokenizer's own end token."""
    return tokenizer.convert_tokens_to_ids(list(chat_template.stop_tokens))


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
        Unusable: nothing can be learned from it within the limit, or its words fake a turn.
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
    return ids, labels


def refuse_control_tokens(chat_template: ChatTemplate, messages: list[Message], tools: list[dict] | None) -> None:
    """Raise Unusable where a text holds a token that only the template may write, such as one that ends a turn."""
    said = [(f"message {number} ({message['role']})", message) for number, message in enumerate(messages, 1)]
    for where, value in [*said, ("the list of tools", tools)]:
        token = chat_template.control_token_in(json.dumps(value, ensure_ascii=False))
        if token:
            raise Unusable(
                "control token",
                f"{where} holds {token}, which the model takes for the mark of a turn and not for words; take it out",
            )


def _ids_and_labels(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: ChatTemplate,
    messages: list[Message],
    tools: list[dict] | None,
    train_on_inputs: bool,
) -> tuple[list[int], list[int]]:
    segments = chat_template.segments(messages, tools)
    text = "".join(segment.text for segment in segments)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if train_on_inputs:
        labels = list(ids)
    else:
        labels = [IGNORED_LABEL] * len(ids)
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
            if segment.learned:
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
    rows = _map_batches(rows, partial(_encode_batch, encode), num_workers, "dialogue", DIALOGUE_FEATURES)
    return _without_faults(rows, "dialogues", on_bad_data)


def _encode_batch(encode, batch: dict[str, list]) -> dict[str, list]:
    """`datasets` maps this over batches: every row stays, one that gives no example says why in `fault`."""
    columns = {"input_ids": [], "labels": [], "length": [], "source": batch["source"], "fault": []}
    for text in batch["dialogue"]:
        messages, tools = json.loads(text)
        ids, labels, fault = [], [], ""
        try:
            ids, labels = encode(messages, tools)
        except Unusable as unusable:
            fault = f"{unusable.reason}\t{unusable.detail}"
        except UserError as error:
            fault = f"not renderable\t{error}"
        columns["input_ids"].append(ids)
        columns["labels"].append(labels)
        columns["length"].append(len(ids))
        columns["fault"].append(fault)
    return columns


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
    for module_file in (__file__, records.__file__, template.__file__):
        whole.update(Path(module_file).read_bytes())
    return whole.hexdigest()
