"""Report every fault of training data before a GPU is rented for it.

    python scripts/check_data.py --dir data/finetune
    python scripts/check_data.py --dataset_name OWNER/NAME:config
    python scripts/check_data.py --dir data/finetune_processed/train --eval_dir data/finetune_processed/validation \\
        --model_name_or_path Qwen/Qwen2.5-3B-Instruct --template_name qwen --model_max_length 2048

Reads what a stage reads, dialogues, preference pairs, labelled replies or pretraining text, and prints each fault as
file:line, then copies, training questions that the evaluation asks too, lengths, what the limit would cut, languages,
and the shortest and longest replies. Nothing is changed; scripts/preprocess_data.py fixes much of it.

Exit code 0: a stage can train on it. 1: it would refuse a record, questions of the evaluation are trained on, or
nothing fits the limit. 2: a mistake in the command.
"""

import argparse
import heapq
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from medtune.errors import Unusable, UserError, run_script
from medtune.reading.foreign_forms import add_ignore_keys
from medtune.reading.guide_form import guide_line
from medtune.reading.hub_data import add_records_flags, load_splits
from medtune.reading.keys import Reading
from medtune.reading.kinds import READERS, Kind, find_kind, kind_of_split
from medtune.reading.near_duplicates import QUESTION_SHINGLE, TEXT_SHINGLE, Distinct, Known, bare_text
from medtune.reading.records import LEFT_OUT, BadRecord, Dialogue, Document, Feedback, Pair, Report
from medtune.reading.sources import Sources
from medtune.reading.thinking import CHOICES, thinking_of_name
from medtune.reading.token_flags import add_token_flags, lengths_at, limits_of, settle_token_flags
from medtune.reading.words import question_of, unread_lines, words_of

Record = Dialogue | Pair | Feedback | Document

# Records compared at a time: more take memory, fewer take time.
BATCH = 1024
N_EXAMPLES = 3
# The defaults of scripts/preprocess_data.py: near copies share this part of their text, and questions that share this
# part of theirs are nearly the same.
NEAR_DUPLICATE_THRESHOLD = 0.9
SPLIT_THRESHOLD = 0.7
# The reason of a fault that hides the rest of its file, of which a stage reads nothing whatever its flags.
UNREADABLE = "unreadable"

# ---------------------------------------------------------------- one record


class Reply(NamedTuple):
    """A reply, or a whole document; sorts by its length in characters."""

    length: int
    source: str
    start: str


def replies_of(record: Record) -> list[Reply]:
    if isinstance(record, Document):
        texts = [record.text]
    elif isinstance(record, Pair):
        texts = [record.chosen, record.rejected]
    elif isinstance(record, Feedback):
        texts = [record.reply]
    else:
        replies = (message for message in record.messages if message["role"] == "assistant")
        texts = [message["content"] for message in replies if message["content"]]
    return [Reply(len(text), record.source, " ".join(text[:60].split())) for text in texts]


_HAN = re.compile("[\u3400-\u9fff\U00020000-\U0003ffff]")
_ENGLISH_WORD = re.compile("[A-Za-z]+")
_LETTER = re.compile(r"[^\W\d_]")


def language_of(text: str) -> str:
    """zh, en or other, by the majority: Chinese characters, words of ASCII letters, or other letters."""
    rest, n_chinese = _HAN.subn("", text)
    rest, n_english = _ENGLISH_WORD.subn("", rest)
    n_other = len(_LETTER.findall(rest))
    counts = {"zh": n_chinese, "en": n_english, "other": n_other}
    return max(counts, key=counts.get) if any(counts.values()) else "other"


class Measured(NamedTuple):
    """The length of a record, and which part of it is over a limit."""

    length: int
    over: str = ""


def measure_by(args: argparse.Namespace, kind: Kind, reading: Reading) -> Callable[[Record], Measured]:
    """A function that measures in tokens (without a tokenizer in characters) and raises Unusable for a fault."""
    if not args.tokenizer:
        return lambda record: Measured(len(words_of(record)))
    from medtune.models.loading import load_tokenizer
    from medtune.reading.encoders import unlimited_encoder

    hub_options = {"cache_dir": args.cache_dir, "trust_remote_code": args.trust_remote_code}
    tokenizer = load_tokenizer(args.tokenizer, flag="--model_name_or_path", **hub_options)
    encoder = unlimited_encoder(kind, tokenizer, args.template_name, args.thinking)

    def measure(record: Record) -> Measured:
        row = encoder(record)
        for _ in range(row.get("n_thoughts_left_out", 0)):
            reading.note(encoder.left_out_thoughts, record.source)
        if isinstance(record, Pair | Feedback):
            prompt, reply = len(row["prompt_ids"]), row["length"] - len(row["prompt_ids"])
            over = [f"prompt {prompt:,}"] if prompt > args.max_source_length else []
            over += [f"reply {reply:,}"] if reply > args.max_target_length else []
            return Measured(row["length"], ", ".join(over))
        # Documents are cut into blocks.
        is_over = isinstance(record, Dialogue) and row["length"] > args.model_max_length
        return Measured(row["length"], f"{row['length']:,}" if is_over else "")

    return measure


# ---------------------------------------------------------------- reading on after faults


def read_all(kind: Kind, files: Sequence[Path], reading: Reading) -> Iterator[Record | BadRecord]:
    """All results of all files; if the rest of a file cannot be read, that is one fault, and the next follows."""
    for path in files:
        try:
            yield from READERS[kind]([path], reading)
        except UserError as error:
            source, _, fault = str(error).partition(": ")
            yield BadRecord(source, UNREADABLE, fault)


# ---------------------------------------------------------------- the survey


@dataclass
class Found:
    """How many records something is true of, and the first of them."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def wants_more(self) -> bool:
        return len(self.examples) < N_EXAMPLES

    def add(self, example: str = "") -> None:
        self.count += 1
        if example and self.wants_more:
            self.examples.append(example)

    def describe(self, n_records: int) -> str:
        share = f"{self.count:,} ({self.count / n_records:.1%})" if self.count else "none"
        more = ", ..." if self.count > len(self.examples) > 0 else ""
        return share + (f": {', '.join(self.examples)}{more}" if self.examples else "")


@dataclass
class Survey:
    """What is known of the records of one folder."""

    kind: Kind
    limits: str
    report: Report = field(default_factory=Report)
    lengths: Counter[int] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    n_questions: Counter[int] = field(default_factory=Counter)
    features: Counter[str] = field(default_factory=Counter)
    labels: Counter[bool] = field(default_factory=Counter)
    copies: Found = field(default_factory=Found)
    near_copies: Found = field(default_factory=Found)
    asked_again: Found = field(default_factory=Found)
    overlap: Found = field(default_factory=Found)
    near_overlap: Found = field(default_factory=Found)
    over_limit: Found = field(default_factory=Found)
    shortest: list[Reply] = field(default_factory=list)
    longest: list[Reply] = field(default_factory=list)

    def add(self, record: Record, measured: Measured) -> None:
        """Count a usable record by itself."""
        self.lengths[measured.length] += 1
        if measured.over:
            self.over_limit.add(f"{record.source} ({measured.over})")
        self.languages[language_of(words_of(record))] += 1
        if not isinstance(record, Document):
            roles = Counter(message["role"] for message in record.messages)
            self.n_questions[roles["user"]] += 1
            self.features["with a system prompt"] += "system" in roles
            self.features["with tools"] += "tool" in roles or bool(getattr(record, "tools", None))
        if isinstance(record, Pair):
            self.features["chosen longer"] += len(record.chosen) > len(record.rejected)
        if isinstance(record, Feedback):
            self.labels[record.is_desirable] += 1
        replies = replies_of(record)
        self.shortest = heapq.nsmallest(N_EXAMPLES, chain(self.shortest, replies))
        self.longest = heapq.nlargest(N_EXAMPLES, chain(self.longest, replies))


def measured_records(
    kind: Kind, files: Sequence[Path], reading: Reading, measure: Callable[[Record], Measured]
) -> Iterator[tuple[Record, Measured] | BadRecord]:
    """The records with their lengths; each fault is printed, and not what a stage leaves out without one."""
    for result in tqdm(read_all(kind, files, reading), unit=" records", disable=None):
        if not isinstance(result, BadRecord):
            try:
                yield result, measure(result)
                continue
            except Unusable as fault:
                result = BadRecord(result.source, fault.reason, fault.detail)
        if result.reason not in LEFT_OUT:
            tqdm.write(f"{result}", file=sys.stdout)
        yield result


def survey(
    kind: Kind,
    files: Sequence[Path],
    reading: Reading,
    measure: Callable[[Record], Measured],
    limits: str,
    evaluation: "Evaluation | None",
) -> Survey:
    """Read the files once and survey their records."""
    result = Survey(kind, limits)
    distinct, questions, sources = Distinct(NEAR_DUPLICATE_THRESHOLD), Distinct(None), Sources()
    usable = result.report.usable(measured_records(kind, files, reading, measure))
    while batch := list(islice(usable, BATCH)):
        records = [record for record, _ in batch]
        for record, measured in batch:
            result.add(record, measured)
        wholes = [record.text if isinstance(record, Document) else guide_line(record) for record in records]
        matches = distinct.keep(list(map(words_of, records)), exact=wholes)
        questions_seen = questions.keep([bare_text(question_of(record)) for record in records])
        for record, match, asked_before in zip(records, matches, questions_seen, strict=True):
            if match is None:
                sources.add(record.source)
                if asked_before and kind != "documents":
                    result.asked_again.add()
                continue
            copies = result.copies if match.is_copy else result.near_copies
            alike = "the same as" if match.is_copy else f"{match.share:.0%} like"
            copies.add(f"{record.source} is {alike} {sources[match.number]}" if copies.wants_more else "")
        if evaluation:
            for record, match in zip(records, evaluation.find(records), strict=True):
                if match:
                    overlap = result.overlap if match.is_copy else result.near_overlap
                    alike = "asks the same as" if match.is_copy else f"asks {match.share:.0%} of"
                    overlap.add(f"{record.source} {alike} {evaluation.sources[match.number]}")
    return result


class Evaluation:
    """The evaluation's questions, among which those of the training data are looked up."""

    def __init__(self, kind: Kind):
        self._known = Known(SPLIT_THRESHOLD, TEXT_SHINGLE if kind == "documents" else QUESTION_SHINGLE)
        self.report = Report()
        self.sources: list[str] = []

    def read(self, kind: Kind, files: Sequence[Path], reading: Reading, measure: Callable[[Record], Measured]) -> None:
        usable = self.report.usable(measured_records(kind, files, reading, measure))
        while batch := list(islice(usable, BATCH)):
            self._known.add([question_of(record) for record, _ in batch])
            self.sources += [record.source for record, _ in batch]

    def find(self, records: Sequence[Record]) -> list:
        return self._known.find([question_of(record) for record in records])


# ---------------------------------------------------------------- what is printed


def percentiles(lengths: Counter[int]) -> str:
    """Percentiles of the lengths as text, each with the share of records up to this length."""
    shares = (0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
    shortest, *at, longest = lengths_at(lengths, (0, *shares, 1))
    listed = ", ".join(f"{share:.0%} up to {length:,}" for share, length in zip(shares, at, strict=True))
    return f"{listed}; shortest {shortest:,}, longest {longest:,}"


def describe(result: Survey, unit: str, evaluation: Evaluation | None) -> Iterator[tuple[str, str]]:
    """Name and value of each line of the report."""
    n_usable, is_text = result.report.kept, result.kind == "documents"
    yield "records", result.report.summary()
    if not n_usable:
        return
    if not is_text:
        n_questions = sum(number * count for number, count in result.n_questions.items())
        parts = [f"{n_questions / n_usable:.2f} questions a record, at most {max(result.n_questions)}"]
        parts += [f"{count / n_usable:.1%} {feature}" for feature, count in result.features.items()]
        yield "turns", ", ".join(parts)
    if result.labels:
        good, bad = result.labels[True], result.labels[False]
        yield "labels", f"{good:,} good replies ({good / n_usable:.1%}), {bad:,} bad ones ({bad / n_usable:.1%})"
    yield "copies", result.copies.describe(n_usable)
    yield "near copies", result.near_copies.describe(n_usable)
    if not is_text:
        yield "asked again", f"with a question from before and another answer: {result.asked_again.describe(n_usable)}"
    if evaluation:
        yield "evaluation", evaluation.report.summary()
        yield "overlap", f"the same question in both: {result.overlap.describe(n_usable)}"
        yield "", f"nearly the same, see for yourself: {result.near_overlap.describe(n_usable)}"
    yield unit, percentiles(result.lengths)
    if result.limits:
        yield "over the limit", f"of {result.limits}: {result.over_limit.describe(n_usable)}"
    yield "languages", ", ".join(f"{name} {count / n_usable:.1%}" for name, count in result.languages.most_common())
    for name, replies in (("shortest", result.shortest), ("longest", result.longest)):
        for number, reply in enumerate(replies):
            name_on_first = f"{name} {'texts' if is_text else 'replies'}" if number == 0 else ""
            yield name_on_first, f"{reply.source}, {reply.length:,} characters: {reply.start}"


def verdict(result: Survey, evaluation: Evaluation | None) -> list[str]:
    """What must be fixed; [] if a stage can train on the data."""
    report, wrong = result.report, []
    faults = report.faults_by_reason + (evaluation.report.faults_by_reason if evaluation else Counter())
    if faults:
        way_out = "" if UNREADABLE in faults else ", or start the stage with --on_bad_data drop"
        wrong.append(f"{faults.total():,} faults, listed above: fix them{way_out}")
    if not report.kept:
        wrong.append("no record can be used")
    elif result.over_limit.count == report.kept:
        wrong.append(f"every record is over {result.limits}")
    if len(result.labels) == 1:
        wrong.append("all replies have the same label, and KTO learns from the difference: add others")
    if result.overlap.count:
        wrong.append(
            f"{result.overlap.count:,} of the training records ask what the evaluation asks, which tests memory"
        )
    return wrong


def advice(result: Survey) -> list[str]:
    """What preprocess_data.py would fix, in a line."""
    parts = []
    if result.copies.count + result.near_copies.count:
        parts.append("leaves out copies and near copies")
    if result.overlap.count + result.near_overlap.count:
        parts.append("splits so that no question is on both sides")
    return [f"scripts/preprocess_data.py {' and '.join(parts)}"] if parts else []


# ---------------------------------------------------------------- main


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add_records_flags(parser, "--dir", "a file, or a folder and all below it, as a stage would get it")
    add("--eval_dir", help="the evaluation's records: are their questions trained on?")
    add_ignore_keys(parser)
    add_token_flags(parser)
    add("--cache_dir", help="folder for downloaded tokenizers")
    add("--trust_remote_code", action="store_true")
    return parser.parse_args(argv)


def find_parts(args: argparse.Namespace) -> tuple[tuple, tuple | None]:
    """Kind, files and unread files of the records; and of the evaluation's, where there are any.

    As in a stage, a data set is evaluated on its own split for it, unless files are named.
    """
    keys, validation = args.ignore_keys, None
    if args.dataset_name is None:
        train = find_kind(args.dir, "--dir", keys)
    else:
        split, validation = load_splits(args.dataset_name, args.cache_dir)
        train = kind_of_split(split, keys)
    if args.eval_dir:
        return train, find_kind(args.eval_dir, "--eval_dir", keys)
    return train, kind_of_split(validation, keys) if validation else None


def main(argv: Sequence[str] | None = None) -> None:
    """Print the faults, the survey and the verdict; raises SystemExit(1) if a stage cannot train on the data."""
    args = parse_args(argv)
    (kind, files, unread), of_evaluation = find_parts(args)
    notes = settle_token_flags(args, kind)
    reading = Reading(args.ignore_keys)
    measure = measure_by(args, kind, reading)
    evaluation = None
    if of_evaluation:
        eval_kind, eval_files, _ = of_evaluation
        if "documents" in {kind, eval_kind} != {kind}:
            evaluated = f"--eval_dir {args.eval_dir}" if args.eval_dir else eval_files[0].name
            flag = "--dir" if args.dir else "--dataset_name"
            raise UserError(f"{evaluated}: holds {eval_kind}, and {flag} {kind}, which ask nothing alike")
        if {file.resolve() for file in files} == {file.resolve() for file in eval_files}:
            raise UserError(
                "--eval_dir: the same files as --dir, of which a stage holds a part out; leave the flag out, or split "
                "them with scripts/preprocess_data.py"
            )
        evaluation = Evaluation(kind)
        evaluation.read(eval_kind, eval_files, Reading(args.ignore_keys), measure)
    result = survey(kind, files, reading, measure, limits_of(args), evaluation)

    where = f" in {len(files)} file{'s' if len(files) > 1 else ''}" if args.dir else ""
    print(f"{args.dir or files[0].name}: {kind}{where}")
    for name, value in describe(result, "tokens" if args.tokenizer else "characters", evaluation):
        print(f"  {name:<18}{value}")
    wrong = verdict(result, evaluation)
    if reading.thoughts_apart and not thinking_of_name(args.template_name, args.thinking):
        asks = f"{reading.thoughts_apart}: a stage asks what becomes of them: {CHOICES}"
        (wrong if args.tokenizer else notes).append(asks)
    conclusion = [f"wrong: {line}" for line in wrong] or ["verdict: a stage can train on this"]
    print("\n".join([*unread_lines(unread), *reading.lines(), *notes, *advice(result), *conclusion]))
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
