"""All records of a part as rows of ids, from the cache where nothing has changed."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

from datasets import Dataset, Features, Value
from datasets import List as ListFeature
from loguru import logger
from transformers import PreTrainedTokenizerBase

import template
from medtune.arguments import DataArguments
from medtune.errors import Unusable, UserError
from medtune.reading.blocks import cut_blocks, encode_documents
from medtune.reading.cache import cached_dataset
from medtune.reading.encoding import (
    Truncation,
    encode_dialogue,
    encode_feedback,
    encode_pair,
    encode_prompt,
    n_thoughts_left_out,
    refuse_control_tokens,
    shorten_prompt,
)
from medtune.reading.finding import RECORD_ENDINGS, are_same_files, content_fingerprint, find_files
from medtune.reading.holdout import choose_part
from medtune.reading.keys import Reading, split_keys
from medtune.reading.record_sets import (
    OnBadData,
    load_dialogues,
    load_documents,
    load_feedback,
    load_pairs,
    load_prompts,
)
from medtune.reading.records import BadRecord, Dialogue, Document, Feedback, Pair, Report, T
from template import ChatTemplate


def load_part(
    part: Literal["train", "eval"],
    *,
    kind: str,
    data_args: DataArguments,
    do_eval: bool,
    read: Callable[..., tuple[Dataset, Report, Report, bool]],
    describe: Callable[[Dataset], str],
    endings: Sequence[str] = RECORD_ENDINGS,
) -> tuple[Dataset, dict[str, str]]:
    """What a stage trains or is evaluated on, and the facts to log.

    Args:
        kind: what the records are: "dialogues", "pairs", "documents", "prompts".
        read: `cached_dialogues` or another of this module, given all but the files and what data_args says.
        describe: the tokens of the rows, in words.

    Raises:
        UserError: a flag is missing, or no record is left.
    """
    flag, path = (
        ("--train_file_dir", data_args.train_file_dir)
        if part == "train"
        else ("--validation_file_dir", data_args.validation_file_dir or data_args.train_file_dir)
    )
    if path is None:
        raise UserError(f"{flag} is missing: name the file or folder of the {kind}")
    held_out = do_eval and are_same_files(data_args.train_file_dir, data_args.validation_file_dir, endings)
    files, unread = find_files(path, flag, endings)
    dataset, read_report, report, was_cached = read(
        part,
        files,
        held_out=held_out,
        max_train_samples=data_args.max_train_samples,
        max_eval_samples=data_args.max_eval_samples,
        num_workers=data_args.preprocessing_num_workers,
        on_bad_data=data_args.on_bad_data,
        ignore_keys=split_keys(data_args.ignore_keys),
        overwrite=data_args.overwrite_cache,
    )
    if len(dataset) == 0:
        examples = "; ".join(line for lines in report.examples.values() for line in lines)
        raise UserError(f"{flag} {path}: {report.summary()}, so nothing is left: {examples}")
    for note in [*read_report.notes, *report.notes]:
        logger.info(f"{part}: {note}")
    for reason, lines in report.examples.items():
        logger.info(f"{part}: left out as {reason}: {'; '.join(lines)}{' ...' if len(lines) == 3 else ''}")
    return dataset, {
        f"{part} files": f"{len(files)} in {path}" + (f", {len(unread)} with other endings not read" if unread else ""),
        f"{part} records": read_report.summary(),
        f"{part} {kind}": report.summary()
        + (", held out of the training files by the seed" if held_out and part == "eval" else ""),
        f"{part} tokens": describe(dataset) + (", from the cache" if was_cached else ""),
    }


def cached_part(
    part: Literal["train", "eval"],
    files: Sequence[Path],
    load: Callable[[Sequence[Path], OnBadData, Reading], tuple[list[T], Report]],
    tokenize: Callable[..., tuple[Dataset, Report]],
    settings: dict,
    cache_dir: str | Path,
    *,
    held_out: bool,
    max_train_samples: int | None,
    max_eval_samples: int | None,
    seed: int,
    num_workers: int = 1,
    on_bad_data: OnBadData = "error",
    ignore_keys: Sequence[str] = (),
    overwrite: bool = False,
) -> tuple[Dataset, Report, Report, bool]:
    """The tokenized records of one part of the files, from the cache where nothing has changed.

    Args:
        load: `load_dialogues`, `load_pairs` or `load_documents`.
        tokenize: makes the rows and a report of the chosen records, given num_workers and on_bad_data.
        settings: what decides the rows besides files and choice: the kind of rows, tokenizer, limits.

    Returns:
        The rows; the reports of reading and of tokenizing; whether they were in the cache.
    """
    choice = {"max_train_samples": max_train_samples, "max_eval_samples": max_eval_samples, "seed": seed}
    if not held_out:  # then nothing depends on how the other part is chosen
        choice |= {"max_eval_samples" if part == "train" else "max_train_samples": None}
        choice |= {"seed": None} if not any(choice[name] for name in ("max_train_samples", "max_eval_samples")) else {}

    def build() -> tuple[Dataset, dict]:
        records, read_report = load(files, on_bad_data, Reading(tuple(ignore_keys)))
        chosen = choose_part(records, part, held_out, **choice)
        dataset, report = tokenize(chosen, num_workers=num_workers, on_bad_data=on_bad_data)
        return dataset, {"read": read_report.as_dict(), "tokenized": report.as_dict()}

    key = settings | choice | {
        "part": part,
        "files": content_fingerprint(files),
        "held_out": held_out,
        "on_bad_data": on_bad_data,
        "ignore_keys": list(ignore_keys),
    }  # fmt: skip
    dataset, reports, was_cached = cached_dataset(cache_dir, key, build, overwrite)
    return dataset, Report.from_dict(reports["read"]), Report.from_dict(reports["tokenized"]), was_cached


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


# Counted of replies before the last, whose thoughts many templates leave out.
LEFT_OUT_THOUGHTS = "thoughts of earlier replies, left out by the template while the replies are learned"


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


FEEDBACK_FEATURES = Features(
    prompt_ids=_IDS,
    reply_ids=_IDS,
    is_desirable=Value("bool"),
    n_cut=_LENGTH,
    length=_LENGTH,
    source=_TEXT,
    fault=_TEXT,
)


def tokenize_feedback(
    feedback: Sequence[Feedback],
    encode: Callable[..., tuple[list[int], list[int], bool]],
    *,
    num_workers: int,
    on_bad_data: Literal["error", "drop"] = "error",
) -> tuple[Dataset, Report]:
    """A dataset of FEEDBACK_FEATURES without `fault`, limits as for pairs, and what was left out and why."""
    rows = Dataset.from_dict(
        {
            "feedback": [json.dumps([f.messages, f.reply, f.tools], ensure_ascii=False) for f in feedback],
            "is_desirable": [f.is_desirable for f in feedback],
            "source": [f.source for f in feedback],
        }
    )
    rows = _map_batches(rows, partial(_encode_feedback, encode), num_workers, "feedback", FEEDBACK_FEATURES)
    return _without_faults(rows, "replies", on_bad_data)


def _encode_feedback(encode: Callable, batch: dict[str, list]) -> dict[str, list]:
    """`datasets` maps this over batches: every row stays, one that gives no example says why in `fault`."""
    columns = {name: [] for name in ("prompt_ids", "reply_ids", "n_cut", "length", "fault")}
    for text in batch["feedback"]:
        fault, prompt_ids, reply_ids, is_cut = "", [], [], False
        try:
            prompt_ids, reply_ids, is_cut = encode(*json.loads(text))
        except Unusable as unusable:
            fault = f"{unusable.reason}\t{unusable.detail}"
        except UserError as error:
            fault = f"not renderable\t{error}"
        row = (prompt_ids, reply_ids, int(is_cut), len(prompt_ids) + len(reply_ids), fault)
        for name, value in zip(columns, row, strict=True):
            columns[name].append(value)
    return columns | {"is_desirable": batch["is_desirable"], "source": batch["source"]}


def cached_feedback(
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
    """`cached_part` of the rows of `tokenize_feedback`, with its other options."""
    limits = {"max_prompt_length": max_prompt_length, "max_reply_length": max_reply_length}
    settings = limits | {"rows": "feedback", "tokenizer": tokenizer_fingerprint(tokenizer)}
    tokenize = partial(tokenize_feedback, encode=partial(encode_feedback, tokenizer, chat_template, **limits))
    return cached_part(part, files, load_feedback, tokenize, settings, cache_dir, **options)


def describe_feedback(dataset: Dataset, max_reply_length: int) -> str:
    """The tokens of the rows of `tokenize_feedback` and how many replies are good ones, in words."""
    n_good, n_cut = sum(dataset["is_desirable"]), sum(dataset["n_cut"])
    cut = f", {n_cut} of {len(dataset)} replies cut at {max_reply_length}" if n_cut else ""
    counts = f"{n_good} replies desirable, {len(dataset) - n_good} undesirable"
    return f"the longest prompt and reply {max(dataset['length'])}{cut}; {counts}"


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
                    shorter = shorten_prompt(tokenizer, messages, n_excess=len(ids) - max_length)
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
        new_fingerprint="not-cached-here",  # hashing a tokenizer takes seconds; cached_dataset has the key
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
    for file in (Path(template.__file__), *sorted(Path(__file__).parent.glob("*.py"))):
        whole.update(file.read_bytes())
    return whole.hexdigest()
