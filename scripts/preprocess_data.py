"""Clean records, remove copies and near copies, and split the rest for training and validation.

Reads dialogues, preference pairs, labelled replies or pretraining text in every form that the stages read, and writes
the guide's:

    python scripts/preprocess_data.py --input_dir data/finetune --output_dir data/finetune_processed

    data/finetune_processed/train/dialogues.jsonl
    data/finetune_processed/validation/dialogues.jsonl   no question of it is nearly one of the training part
    data/finetune_processed/lengths.png                  a histogram
    data/finetune_processed.report.json                  what was changed and left out; beside the folder, since a
                                                         stage takes every .json in it for records

With --model_name_or_path, lengths are in tokens, dialogues over --model_max_length are left out, and those that stay
are tokenized into the cache of supervised_finetuning.py: with the same settings, it starts to train at once.

Memory grows by about 250 bytes a record, however long it is; a cache takes what the stage would take to make it.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from medtune.errors import Unusable, UserError, run_script
from medtune.output_files import new_folder, new_text_file, refuse_same
from medtune.reading.cleaning import Cleaner, Record
from medtune.reading.foreign_forms import add_ignore_keys
from medtune.reading.guide_form import guide_line
from medtune.reading.hub_data import add_records_flags, load_splits, named_records, parse_name
from medtune.reading.keys import Reading
from medtune.reading.kinds import READERS, Kind, find_kind, is_plain_text, kind_of_split
from medtune.reading.near_duplicates import QUESTION_SHINGLE, TEXT_SHINGLE, Distinct, Groups, bare_text
from medtune.reading.records import BadRecord, Document, Feedback, Pair, Report
from medtune.reading.sources import Sources
from medtune.reading.token_flags import add_token_flags, lengths_at, settle_token_flags
from medtune.reading.words import dropped_lines, question_of, unread_lines, words_of

if TYPE_CHECKING:
    from medtune.reading.encoders import Encoder

# Records compared at a time: more take memory, fewer take time.
BATCH = 1024
# The default of --validation_size; never more than a tenth of the records.
VALIDATION_SIZE = 500

# ---------------------------------------------------------------- lengths


def load_encoder(args: argparse.Namespace, kind: Kind) -> "Encoder":
    """The stage's encoder: with its limits for dialogues, without limits otherwise, since a stage would cut."""
    from medtune.models.loading import load_tokenizer
    from medtune.reading.encoders import unlimited_encoder

    hub_options = {"cache_dir": args.cache_dir, "trust_remote_code": args.trust_remote_code}
    tokenizer = load_tokenizer(args.tokenizer, flag="--model_name_or_path", **hub_options)
    encoder = unlimited_encoder(kind, tokenizer, args.template_name, args.thinking)
    if kind != "dialogues":
        return encoder
    limits = {"max_length": args.model_max_length, "truncation": args.truncation}
    return dataclasses.replace(encoder, **limits, train_on_inputs=args.train_on_inputs == "True")


def token_length(record: Record, encoder: "Encoder", args: argparse.Namespace) -> int:
    """Tokens of a record. Raises Unusable if the stage would refuse it, drop it or cut a reply."""
    row = encoder(record)
    if isinstance(record, Pair | Feedback):
        prompt = len(row["prompt_ids"])
        for length, name in ((prompt, "max_source_length"), (row["length"] - prompt, "max_target_length")):
            if length > getattr(args, name):
                raise Unusable("too long", f"{length} tokens, over --{name} {getattr(args, name)}")
    return row["length"]


# ---------------------------------------------------------------- first pass: clean, measure, leave copies out


def clean_and_measure(
    results: Iterable[Record | BadRecord], cleaner: Cleaner, measure: Callable[[Record], int], report: Report
) -> Iterator[tuple[Record, int]]:
    """The usable records, cleaned, and their lengths; the others are counted."""
    for record in report.usable(results):
        try:
            cleaned = cleaner(record)
            yield cleaned, measure(cleaned)
        except Unusable as fault:
            report.drop(BadRecord(record.source, fault.reason, fault.detail))


def keep_distinct(
    records: Iterator[tuple[Record, int]], threshold: float | None, is_text: bool, kept: TextIO, report: Report
) -> Counter[int]:
    """Write each record that is not a copy or near copy of one before it, a line each; returns their lengths.

    Good and bad replies are compared apart, since a small difference may be what makes a reply bad.
    """
    distinct, lengths = defaultdict(partial(Distinct, threshold)), Counter()
    sources, n_kept = Sources(), 0
    numbers: dict[bool | None, array] = defaultdict(partial(array, "q"))  # of a label's kept records, among all kept
    firsts: dict[str, dict[int, str]] = {"duplicate": {}, "near duplicate": {}}
    while batch := list(islice(records, BATCH)):
        lines = [line_of(record, is_text) for record, _ in batch]
        labels = [getattr(record, "is_desirable", None) for record, _ in batch]
        matches = {}
        for label in set(labels):
            members = [index for index, other in enumerate(labels) if other == label]
            texts = [words_of(batch[index][0]) for index in members]
            found = distinct[label].keep(texts, exact=[lines[index] for index in members])
            matches |= dict(zip(members, found, strict=True))
        for index, (record, length) in enumerate(batch):
            match, of_label = matches[index], numbers[labels[index]]
            if match is None:
                of_label.append(n_kept)
                n_kept += 1
                kept.write(lines[index])
                sources.add(record.source)
                lengths[length] += 1
            else:
                reason, number = "duplicate" if match.is_copy else "near duplicate", of_label[match.number]
                # Each look-up reads a file; the report shows three of a kind.
                if number not in firsts[reason] and len(firsts[reason]) < 3:
                    firsts[reason][number] = sources[number]
                first = firsts[reason].get(number, "another")
                detail = f"the same as {first}" if match.is_copy else f"{match.share:.0%} like {first}"
                report.drop(BadRecord(record.source, reason, detail))
    return lengths


def line_of(record: Record, is_text: bool) -> str:
    """The guide's record as a line; of text from .txt files, the text."""
    if not isinstance(record, Document):
        return guide_line(record)
    if is_text:  # a document a line
        return " ".join(stripped for line in record.text.split("\n") if (stripped := line.strip())) + "\n"
    return json.dumps({"text": record.text}, ensure_ascii=False) + "\n"


# ---------------------------------------------------------------- second pass: choose what validates


def group_questions(
    questions: Iterable[str], seed: int, threshold: float, shingle: int
) -> tuple[np.ndarray, np.ndarray]:
    """[number of questions] group of similar questions of each, and uint64 keys by the seed."""
    groups, keys = Groups(threshold, shingle), []
    questions = iter(questions)
    while batch := list(islice(questions, BATCH)):
        groups.add(batch)
        digests = b"".join(hashlib.blake2b(f"{seed}:{bare_text(q)}".encode(), digest_size=8).digest() for q in batch)
        keys.append(np.frombuffer(digests, dtype=np.uint64))
    return groups.labels(), np.concatenate(keys)


def choose_groups(labels: np.ndarray, keys: np.ndarray, n_holdout: int) -> np.ndarray:
    """[number of records] bool: at most `n_holdout` in whole groups, whatever the order of the records."""
    _, members, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    group_keys = np.zeros(len(sizes), dtype=np.uint64)
    np.add.at(group_keys, members, keys)  # the sum wraps, and so stays as random as its terms
    chosen, left = np.zeros(len(sizes), dtype=bool), n_holdout
    for group in np.argsort(group_keys):
        if sizes[group] <= left:
            chosen[group] = True
            left -= sizes[group]
        if not left:
            break
    return chosen[members]


def number_to_hold_out(validation_size: float | None, n_records: int) -> int:
    if validation_size is None:
        return max(1, min(VALIDATION_SIZE, n_records // 10))
    return int(validation_size) if validation_size >= 1 else round(validation_size * n_records)


# ---------------------------------------------------------------- what is written


def write_parts(kept: Path, held_out: np.ndarray, folder: Path, name: str) -> dict[str, int]:
    """Write train/NAME and, if records are held out, validation/NAME; returns the number of records of each."""
    masks = {"train": ~held_out} | ({"validation": held_out} if held_out.any() else {})
    with ExitStack() as stack:
        files = {}
        for part in masks:
            (folder / part).mkdir()
            files[part] = stack.enter_context((folder / part / name).open("w", encoding="utf-8", newline="\n"))
        lines = stack.enter_context(kept.open(encoding="utf-8", newline="\n"))
        for line, is_held_out in zip(lines, held_out.tolist(), strict=True):
            files["validation" if is_held_out else "train"].write(line)
    return {part: int(mask.sum()) for part, mask in masks.items()}


def describe_lengths(lengths: Counter[int]) -> dict[str, int]:
    """Percentiles of the lengths."""
    shares = {"shortest": 0, "median": 0.5, "95 % at most": 0.95, "99 % at most": 0.99, "longest": 1}
    return dict(zip(shares, lengths_at(lengths, list(shares.values())), strict=True))


def save_histogram(path: Path, lengths: Counter[int], unit: str, limit: int | None) -> None:
    """Plot a histogram of the lengths, with the longest 1 % in the last bar."""
    from matplotlib.figure import Figure

    end = describe_lengths(lengths)["99 % at most"] + 1
    values = np.array(list(lengths))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.hist(np.minimum(values, end), bins=min(60, end), range=(0, end), weights=list(lengths.values()))
    if limit is not None and limit <= end:
        axes.axvline(limit, color="black", linestyle="--", label=f"--model_max_length {limit}")
        axes.legend()
    axes.set(xlabel=f"{unit} a record (longer ones in the last bar)", ylabel="records", xlim=(0, end))
    figure.savefig(path, format="png", dpi=120)


def fill_cache(args: argparse.Namespace, encoder: "Encoder", parts: dict[str, Path]) -> list[str]:
    """Tokenize each part as supervised_finetuning.py does; returns one line for each part."""
    import datasets

    from medtune.arguments import DataArguments
    from medtune.reading.readers import read_dialogues
    from medtune.reading.stage_data import prepare_part

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    data_args = DataArguments(
        max_train_samples=args.max_train_samples,
        max_eval_samples=args.max_eval_samples,
        preprocessing_num_workers=args.preprocessing_num_workers,
    )
    # Without a validation part the stage, pointed at the same folder twice, holds one out itself.
    held_out = "validation" not in parts
    files = {"train": parts["train"], "eval": parts.get("validation", parts["train"])}
    lines = []
    for part, path in files.items():
        prepared = prepare_part(part, [path], held_out, read_dialogues, encoder, data_args, args.seed, args.cache_dir)
        how = "in the cache already" if prepared.was_cached else "tokenized into the cache"
        n_tokens = sum(prepared.rows["length"][:])
        lines.append(f"{part}: {len(prepared.rows):,} dialogues, {n_tokens:,} tokens, {how}")
    return lines


OF_TEMPLATE = ("template_name", "thinking")
# The script of each kind, and those of its flags that are known here.
STAGES = {
    "dialogues": ("supervised_finetuning.py", (*OF_TEMPLATE, "model_max_length", "truncation", "train_on_inputs")),
    "pairs": ("dpo_training.py", (*OF_TEMPLATE, "max_source_length", "max_target_length")),
    "replies": ("dpo_training.py --loss_type kto", (*OF_TEMPLATE, "max_source_length", "max_target_length")),
    "documents": ("pretraining.py", ()),
}


def next_command(args: argparse.Namespace, kind: Kind, parts: dict[str, Path]) -> str:
    """The command of the stage that trains on the output, with the settings of its cache."""
    script, names = STAGES[kind]
    flags = {
        "train_file_dir": parts["train"].parent,
        "validation_file_dir": parts.get("validation", parts["train"]).parent,
        "seed": args.seed,
    }
    if args.tokenizer:
        names = (*names, "max_train_samples", "max_eval_samples", "cache_dir")
        flags = {"model_name_or_path": args.tokenizer, **flags, **{name: getattr(args, name) for name in names}}
    flags_text = " ".join(f"--{name} {value}" for name, value in flags.items() if value is not None)
    return f"python {script} {flags_text} --do_train --do_eval ..."


# ---------------------------------------------------------------- main


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add_records_flags(parser, "--input_dir", "a file, or a folder and all below it, of one kind of records")
    add("--output_dir", required=True, type=Path, help="the new folder; the report is written beside it")
    add_ignore_keys(parser)
    add("--overwrite", action="store_true", help="replace what this tool wrote there before")
    add("--mask_personal_data", action="store_true", help="mask Chinese mobile and ID numbers, and e-mail addresses")
    add(
        "--near_duplicate_threshold",
        type=float,
        default=0.9,
        help="leave out a record with this share of its runs of five characters in common with another; 1: copies only",
    )
    add("--min_length", type=int, default=1, help="characters, or with a tokenizer tokens, of the shortest record")
    add(
        "--validation_size",
        type=float,
        help=f"records to hold out, or a share below 1; 0: none (default: {VALIDATION_SIZE}, at most a tenth)",
    )
    add(
        "--split_threshold",
        type=float,
        default=0.7,
        help="questions with this share of their runs of three characters in common stay on one side",
    )
    add("--seed", type=int, default=42, help="of the split, and of what the stage draws")
    group = parser.add_argument_group("lengths in tokens and the stage's cache; the flags are those of the stage")
    add = group.add_argument
    add_token_flags(group)
    add("--truncation", choices=("drop", "cut_prompt_start", "cut_reply"), default="drop")
    add("--train_on_inputs", nargs="?", choices=("True", "False"), const="True", default="False")
    add("--max_train_samples", type=int)
    add("--max_eval_samples", type=int)
    add("--preprocessing_num_workers", type=int, default=1)
    add("--cache_dir")
    add("--trust_remote_code", action="store_true")
    args = parser.parse_args(argv)

    for name in ("near_duplicate_threshold", "split_threshold"):
        if not 0 < getattr(args, name) <= 1:
            raise UserError(f"--{name} {getattr(args, name)}: give a share above 0, and 1 at most")
    size = args.validation_size
    if size is not None and (size < 0 or (size > 1 and not size.is_integer())):
        raise UserError(f"--validation_size {size}: give a number of records, or a share below 1")
    return args


def hold_out(args: argparse.Namespace, kind: Kind, kept: Path, n_kept: int) -> np.ndarray:
    """[number of records] bool. Raises UserError where one of the parts would be empty."""
    n_holdout = number_to_hold_out(args.validation_size, n_kept)
    if not n_holdout:
        return np.zeros(n_kept, dtype=bool)
    shingle = TEXT_SHINGLE if kind == "documents" else QUESTION_SHINGLE
    records = progress(READERS[kind]([kept]), "comparing questions")
    labels, keys = group_questions(map(question_of, records), args.seed, args.split_threshold, shingle)
    assert len(labels) == n_kept, (len(labels), n_kept)
    held_out = choose_groups(labels, keys, n_holdout)
    if held_out.all() or not held_out.any():
        raise UserError(
            f"--validation_size: cannot hold out {n_holdout} of {n_kept} records, since records with like "
            "questions stay together; change it, raise --split_threshold, or give 0 to hold out none"
        )
    return held_out


def progress(items: Iterable, what: str) -> Iterable:
    return tqdm(items, desc=what, unit=" records", disable=None)


def check_places(args: argparse.Namespace, files: Sequence[Path]) -> None:
    """Refuse an output inside the input or above it, since the next run would read this one's output."""
    refuse_same(files, args.output_dir, "--output_dir")
    folder = args.input_dir or parse_name(args.dataset_name)[0]
    if Path(folder).resolve() in args.output_dir.resolve().parents:
        raise UserError(f"--output_dir {args.output_dir}: lies in {named(args)}; write beside it")


def named(args: argparse.Namespace) -> str:
    return named_records("--input_dir", args.input_dir, args.dataset_name)


def nothing_kept(args: argparse.Namespace, report: Report) -> str:
    if not report.read:
        return f"{named(args)}: there are no records in it"
    lines = [f"{named(args)}: {report.summary()}", *dropped_lines(report)]
    if "unknown keys" in report.dropped:
        lines.append("scripts/convert_data_format.py reads other forms and columns")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, clean, deduplicate, split, write, fill the cache, and print a summary."""
    args = parse_args(argv)
    if args.dataset_name is None:
        kind, files, unread = find_kind(args.input_dir, "--input_dir", args.ignore_keys)
    else:
        split, _ = load_splits(args.dataset_name, args.cache_dir)
        kind, files, unread = kind_of_split(split, args.ignore_keys)
    notes = settle_token_flags(args, kind)
    reading = Reading(args.ignore_keys)
    check_places(args, files)
    encoder = load_encoder(args, kind) if args.tokenizer else None
    unit = "tokens" if encoder else "characters"
    limit = args.model_max_length if encoder and kind == "dialogues" else None
    is_text = kind == "documents" and all(map(is_plain_text, files))
    name = f"{kind}.txt" if is_text else f"{kind}.jsonl"
    report_file = args.output_dir.parent / f"{args.output_dir.resolve().name}.report.json"
    report, cleaner = Report(), Cleaner(args.mask_personal_data)

    def measure(record: Record) -> int:
        length = token_length(record, encoder, args) if encoder else len(words_of(record))
        if length < args.min_length:
            raise Unusable("too short", f"{length} {unit}, under --min_length {args.min_length}")
        return length

    with (
        new_text_file(report_file, "--output_dir", args.overwrite) as written_report,
        new_folder(args.output_dir, "--output_dir", args.overwrite) as folder,
    ):
        kept = folder / f".kept{Path(name).suffix}"
        with kept.open("w", encoding="utf-8", newline="\n") as file:
            records = clean_and_measure(progress(READERS[kind](files, reading), "cleaning"), cleaner, measure, report)
            threshold = args.near_duplicate_threshold if args.near_duplicate_threshold < 1 else None
            lengths = keep_distinct(records, threshold, is_text, file, report)
        if not lengths:
            raise UserError(nothing_kept(args, report))
        sizes = write_parts(kept, hold_out(args, kind, kept, lengths.total()), folder, name)
        kept.unlink()
        save_histogram(folder / "lengths.png", lengths, unit, limit)
        report.notes = reading.lines()
        report_values = {
            "kind": kind,
            "files": len(files),
            "flags": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
            "read": report.read,
            "dropped": dict(report.dropped),
            "examples": {reason: report.examples(reason) for reason in report.dropped},
            "notes": report.notes,
            "kept": report.kept,
            "cleaned": dict(cleaner.changed),
            "masked": dict(cleaner.masked),
            f"{unit} a record": describe_lengths(lengths),
            "parts": sizes,
        }
        written_report.write(json.dumps(report_values, ensure_ascii=False, indent=2) + "\n")

    parts = {part: args.output_dir / part / name for part in sizes}
    print("\n".join([f"{args.output_dir}: {kind}, {report.summary()}", *dropped_lines(report)]))
    for done, counts in (("records cleaned of", cleaner.changed), ("masked", cleaner.masked)):
        if counts:
            print(f"{done}: {', '.join(f'{what} {count:,}' for what, count in counts.most_common())}")
    print(f"{unit} a record: {', '.join(f'{what} {length:,}' for what, length in describe_lengths(lengths).items())}")
    for part, size in sizes.items():
        print(f"{part}: {size:,} records in {parts[part]}")
    print(f"report: {report_file}; histogram of the lengths: {args.output_dir / 'lengths.png'}")
    for line in [*report.notes, *unread_lines(unread)]:
        print(line)
    if encoder and kind == "dialogues":
        print("\n".join(fill_cache(args, encoder, parts)))
    elif encoder:
        print(f"no cache: only dialogues are tokenized beforehand, the stage does it for {kind}")
    print("\n".join([*notes, f"next: {next_command(args, kind, parts)}"]))


if __name__ == "__main__":
    run_script(main)
