"""From files to rows: find, read, hold out, encode, and cache for the next start."""

import hashlib
import os
import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datasets import Dataset, Features, IterableDataset, Value
from loguru import logger
from transformers import PreTrainedTokenizerBase, TrainingArguments

from medtune.arguments import DataArguments
from medtune.errors import Unusable, UserError
from medtune.reading.cache import open_cache
from medtune.reading.encoders import Encoder
from medtune.reading.finding import RecordFile, content_fingerprint, some_names
from medtune.reading.holdout import choose_part
from medtune.reading.keys import Reading, split_keys
from medtune.reading.parts import PartName, find_parts
from medtune.reading.readers import OnBadData, read_all
from medtune.reading.records import BadDataError, BadRecord, Report, T
from medtune.reading.thinking import CHOICES

# A process costs about a second to start, which fewer rows do not repay.
ROWS_A_PROCESS = 1000

Read = Callable[[Sequence[RecordFile], Reading], Iterable[T | BadRecord]]


@dataclass
class Data:
    """What a stage is trained and evaluated on, and the facts to log."""

    train: Dataset | IterableDataset | None
    eval: Dataset | None
    facts: dict[str, str]


@dataclass(frozen=True)
class Part:
    """The rows of the training or the evaluation data, and what was left out on the way."""

    rows: Dataset
    read: Report  # of the records of all files
    encoded: Report  # of the records chosen for this part
    was_cached: bool


def prepare_data(
    read_records: Read,
    encoder: Encoder,
    data_args: DataArguments,
    training_args: TrainingArguments,
    cache_dir: str | None,
    parts: Sequence[PartName] = ("train", "eval"),
) -> Data:
    """The rows that a stage trains on and, with --do_eval, is evaluated on.

    Args:
        read_records: `read_dialogues`, `read_pairs`, `read_prompts` or `read_documents`, to suit the encoder.
        cache_dir: --cache_dir; the rows are kept in its folder "tokenized", data sets of the hub in "datasets".
        parts: which of them to prepare.

    Raises:
        UserError: a flag is missing or names no such files, records are bad and not dropped, or none is left.
    """
    listings, held_out = find_parts(data_args, training_args.do_eval, encoder.kind, encoder.endings, cache_dir)

    prepared_parts: dict[PartName, Part] = {}
    errors: list[BadDataError] = []
    for part in (part for part in listings if part in parts):
        how = (held_out, read_records, encoder, data_args, training_args.seed, cache_dir)
        try:
            prepared_parts[part] = prepare_part(part, listings[part].files, *how)
        except BadDataError as error:
            errors.append(error)
    if errors:
        raise BadDataError.join(errors)

    rows: dict[PartName, Dataset] = {}
    facts: dict[str, str] = {}
    for part, prepared in prepared_parts.items():
        report = prepared.encoded
        if len(prepared.rows) == 0:
            examples = "; ".join(line for reason in report.dropped for line in report.examples(reason))
            raise UserError(f"{listings[part].named}: {report.summary()}, so nothing is left: {examples}")
        for note in [*prepared.read.notes, *report.notes]:
            logger.info(f"{part}: {note}")
        for reason, count in report.dropped.items():
            examples = report.examples(reason)
            logger.info(f"{part}: {count:,} left out as {reason}: {'; '.join(examples)}")
        by_seed = ", held out of the training data by the seed" if held_out and part == "eval" else ""
        facts |= listings[part].describe(part) | {
            f"{part} records": prepared.read.summary(),
            f"{part} {encoder.kind}": f"{report.summary()}{by_seed}",
            f"{part} tokens": encoder.describe(prepared.rows) + (", from the cache" if prepared.was_cached else ""),
        }
        rows[part] = prepared.rows
    return Data(rows.get("train"), rows.get("eval"), facts)


def prepare_part(
    part: PartName,
    files: Sequence[RecordFile],
    held_out: bool,
    read_records: Read,
    encoder: Encoder,
    data_args: DataArguments,
    seed: int,
    cache_dir: str | None,
) -> Part:
    """The rows of one part of the files, from the cache where nothing has changed.

    held_out: both parts are of these files. The tool that fills the cache beforehand calls this too.
    """
    choice = {
        "max_train_samples": data_args.max_train_samples,
        "max_eval_samples": data_args.max_eval_samples,
        "seed": seed,
    }
    if not held_out:  # then nothing depends on how the other part is chosen
        choice["max_eval_samples" if part == "train" else "max_train_samples"] = None
        if not (choice["max_train_samples"] or choice["max_eval_samples"]):
            choice["seed"] = None
    ignore_keys = split_keys(data_args.ignore_keys)
    key = encoder.limits | choice | {
        "rows": encoder.kind,
        "thinking": encoder.thinking,
        "tokenizer": tokenizer_fingerprint(encoder.tokenizer),
        "part": part,
        "files": content_fingerprint(files),
        "held_out": held_out,
        "on_bad_data": data_args.on_bad_data,
        "ignore_keys": list(ignore_keys),
    }  # fmt: skip
    with open_cache(Path(cache_dir or "cache", "tokenized"), key, data_args.overwrite_cache) as cache:
        was_cached = cache.rows is not None
        if not was_cached:
            reading = Reading(ignore_keys, unread=encoder.unread)
            records, report = read_all(read_records, files, reading)
            # The faults of all steps are said at once.
            refusals = []
            if report.faults_by_reason and data_args.on_bad_data == "error":
                refusals = [report.refusal("records", report.faults_by_reason)]
            if reading.thoughts_apart and encoder.thinking is None:
                thoughts = f"{some_names(files)}: {reading.thoughts_apart}"
                raise BadDataError(refusals, f"{thoughts}; say what becomes of them: {CHOICES}")
            try:
                chosen = choose_part(records, part, held_out, **choice)
                workers, on_bad_data = data_args.preprocessing_num_workers, data_args.on_bad_data
                rows, encoded = encode_records(chosen, encoder, workers, on_bad_data)
            except BadDataError as error:
                refusals += error.refusals
            except UserError:
                if not refusals:
                    raise
            if refusals:
                raise BadDataError(refusals)
            cache.save(rows, {"read": report.as_dict(), "encoded": encoded.as_dict()})
    reports = cache.report
    return Part(cache.rows, Report.from_dict(reports["read"]), Report.from_dict(reports["encoded"]), was_cached)


def encode_records(
    records: Sequence[T], encoder: Encoder, num_workers: int = 1, on_bad_data: OnBadData = "error"
) -> tuple[Dataset, Report]:
    """The finished rows of the records, in their order, and what was left out and why.

    Raises UserError under "error" where a record has a fault and is not just over the limit.
    """
    examples = [example for record in records for example in encoder.examples(record)]
    # As bytes: a column of `datasets` has one type, and the arguments of tool calls have many.
    rows = Dataset.from_dict({"example": [pickle.dumps(example) for example in examples]})
    n_processes = max(1, min(num_workers, os.cpu_count() or 1, len(rows) // ROWS_A_PROCESS))
    rows = rows.map(
        partial(_encode_batch, encoder),
        batched=True,
        num_proc=n_processes if n_processes > 1 else None,
        remove_columns=["example"],
        features=Features(encoder.features | {"reason": Value("string"), "detail": Value("string")}),
        new_fingerprint="not-cached-here",  # hashing a tokenizer takes seconds; the cache has its own key
        load_from_cache_file=False,
        desc="tokenizing",
    )
    report = Report(read=len(rows))
    usable = []
    # A whole column at once: row by row datasets 5.2 takes 400 times as long.
    columns = (rows[name][:] for name in ("source", "reason", "detail"))
    for index, (source, reason, detail) in enumerate(zip(*columns, strict=True)):
        if reason is None:
            usable.append(index)
        else:
            report.drop(BadRecord(source, reason, detail))
    if report.faults_by_reason and on_bad_data == "error":
        raise BadDataError([report.refusal(encoder.kind, report.faults_by_reason)])
    return encoder.finish(rows.select(usable).remove_columns(["reason", "detail"]), report), report


def _encode_batch(encoder: Encoder, batch: dict[str, list]) -> dict[str, list]:
    """Encode a batch for `datasets.map`; an example without a row has `reason` and `detail`."""
    examples = [pickle.loads(pickled) for pickled in batch["example"]]
    rows = []
    for example, row in zip(examples, encoder.rows(examples), strict=True):
        given = {"reason": row.reason, "detail": row.detail} if isinstance(row, Unusable) else row
        rows.append(dict.fromkeys([*encoder.features, "reason", "detail"]) | {"source": example.source} | given)
    return {name: [row[name] for row in rows] for name in rows[0]}


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over all that decides ids: vocabulary, merges, special tokens, chat template and the code itself."""
    whole = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    whole.update(f"{tokenizer.chat_template}\0{tokenizer.eos_token}\0{tokenizer.bos_token}".encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        whole.update(file.read_bytes())
    return whole.hexdigest()
