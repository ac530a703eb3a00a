"""Data sets of the hub, or of a folder laid out as one: `--dataset_name NAME[:config[:split]]`.

The package `datasets` downloads and prepares them; their rows are then read as the records of a file are.
"""

import argparse
import hashlib
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self
from zipfile import BadZipFile

from medtune.errors import Unusable, UserError
from medtune.offline import go_offline_without_hub
from medtune.reading.byte_faults import readable_rows
from medtune.reading.json_files import read_json

if TYPE_CHECKING:
    from datasets import Dataset

DATASET_FLAG = "--dataset_name"
# What `datasets` calls them, whatever the files of the set are called.
TRAIN, VALIDATION = "train", "validation"
# Rows decoded at a time.
BATCH = 1000
BY_FILES = "download its files (`hf download --repo-type dataset --local-dir FOLDER`) and name FOLDER as files"

NO_ROWS = "there is no row in its files; download or copy them again"


@dataclass(frozen=True)
class HubSplit:
    """A split of a data set, which stands where a file does.

    name: `NAME:split` or `NAME:config:split`, in place of a file's name in messages.
    others: what is not read: the set's other splits, and the files of a folder that are in none.
    """

    name: str
    rows: "Dataset" = field(repr=False, compare=False)
    others: tuple[str, ...] = field(default=(), compare=False)

    def records(self) -> Iterator[tuple[str, dict | Unusable]]:
        """Each row as it is, or Unusable for one whose bytes are no text, and its place: `NAME:split:row N`, from 1."""
        decoder = _decoder(dict(self.rows.features))
        number = 0
        # As arrow: `datasets` would decode pictures, which nobody reads and which takes another package.
        for table in self.rows.with_format("arrow").iter(BATCH):
            for record in readable_rows(table):
                number += 1
                is_read = decoder and not isinstance(record, Unusable)
                yield f"{self.name}:row {number}", decoder(record) if is_read else record

    def sha256(self) -> str:
        """Of the files of the rows, for the cache's key; `name` says which of the rows."""
        digest = hashlib.sha256()
        for file in self.rows.cache_files:
            with Path(file["filename"]).open("rb") as rows:
                digest.update(hashlib.file_digest(rows, "sha256").digest())
        return digest.hexdigest()

    def resolve(self) -> Self:
        """What is equal for the same rows, as of a path."""
        return self


def load_splits(dataset_name: str, cache_dir: str | None) -> tuple[HubSplit, HubSplit | None]:
    """The split that `--dataset_name` names, and the set's own for evaluation: None where it has none, or trains on it.

    Args:
        cache_dir: --cache_dir; prepared data sets are kept in its folder "datasets", or in the hub's without it.

    Raises:
        UserError: the hub has no such data set, configuration or split, or cannot be reached; or the data set cannot be
            prepared.
    """
    import datasets  # seconds that only who has such data should wait

    name, config, split = parse_name(dataset_name)
    if not name or not Path(name).is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise UserError(
                f"{DATASET_FLAG} {dataset_name}: neither a folder here nor the name of a data set, OWNER/NAME"
            )
        datasets.config.HF_HUB_OFFLINE = go_offline_without_hub()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    with _explain_errors(dataset_name, name):
        folder = str(Path(cache_dir, "datasets")) if cache_dir else None
        builder = datasets.load_dataset_builder(name, config or None, cache_dir=folder)
        builder.download_and_prepare()
    splits = tuple(part for part, info in builder.info.splits.items() if info.num_examples)
    if not splits:
        raise UserError(f"{DATASET_FLAG} {dataset_name}: {NO_ROWS}")
    named = {part.partition("[")[0] for part in split.split("+")}
    if lacking := named.difference(splits):
        fault = "no row in the split" if min(lacking) in builder.info.splits else "no split"
        ways = " or ".join(f"{name}:{config}:{other}" for other in splits)
        raise UserError(f"{DATASET_FLAG} {dataset_name}: it has {fault} {min(lacking)!r}; give {ways}")
    asked = [split, VALIDATION] if VALIDATION in set(splits) - named else [split]
    with _explain_errors(dataset_name, name):
        rows = [builder.as_dataset(split=split) for split in asked]
    others = [other for other in splits if other not in named.union(asked)]
    others += _files_in_no_split(Path(name), builder.config.data_files) if Path(name).is_dir() and not config else []
    shown = f"{name}:{config}" if config else name
    parts = [HubSplit(f"{shown}:{split}", part, tuple(others)) for split, part in zip(asked, rows, strict=True)]
    return parts[0], parts[1] if len(parts) > 1 else None


def add_records_flags(parser: argparse.ArgumentParser, flag: str, what: str) -> None:
    """A tool's flag for its files, and --dataset_name in its place."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument(flag, help=what)
    group.add_argument(
        DATASET_FLAG, metavar="NAME[:config[:split]]", help="a data set of the hub; its split train, by default"
    )


def named_records(flag: str, path: str | None, dataset_name: str | None) -> str:
    """Which of the two flags was given, and its value."""
    return f"{flag} {path}" if dataset_name is None else f"{DATASET_FLAG} {dataset_name}"


def parse_name(dataset_name: str) -> tuple[str, str, str]:
    """Name, configuration ("" without one) and split of `NAME[:config[:split]]`; a split may be a slice."""
    name, config, split, *_ = [*dataset_name.split(":", 2), "", ""]
    return name, config, split or TRAIN


@contextmanager
def _explain_errors(dataset_name: str, name: str) -> Iterator[None]:
    """Turn what `datasets` raises into one line that says what to do, and keep back what it logs of that."""
    from datasets import config
    from datasets.exceptions import DatasetsError
    from datasets.utils import logging
    from datasets.utils.metadata import yaml  # with which it reads the head of README.md

    # Also what it lets through of an empty file, a head of README.md, and files that are not packed as they are called.
    unread = StopIteration, yaml.YAMLError, EOFError, BadZipFile, zlib.error
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    except (DatasetsError, OSError, ValueError, RuntimeError, *unread) as error:
        raise UserError(f"{DATASET_FLAG} {dataset_name}: {_reason(error, name, config.HF_ENDPOINT)}") from error
    finally:
        logging.set_verbosity(verbosity)


def _reason(error: BaseException, name: str, endpoint: str) -> str:
    """What went wrong and what to do."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    text = " ".join(str(error).split())
    if listed := re.search(r"available(?: configs)?: (\[.*?\])", text, re.IGNORECASE):
        configs = re.findall(r"'([^']*)'", listed[1])
        ways = " or ".join(f"{name}:{config}" for config in configs)
        return f"name one of its configurations: {ways}; a split stands behind a second colon"
    if any(isinstance(cause, ConnectionError) for cause in causes):
        return (
            f"no folder of that name here, and {endpoint} cannot be reached: check the network, set HF_ENDPOINT to a "
            "mirror, or give the folder of a downloaded data set"
        )
    if "gated dataset" in text:
        return f"a gated data set: accept its terms on {endpoint} and set HF_TOKEN to a token of your account"
    if "doesn't exist on the Hub" in text:
        return f"no public data set on {endpoint}: check the name; a private one needs HF_TOKEN"
    if "401" in text:
        return f"{endpoint} does not accept the token in HF_TOKEN: make a new one, or unset it for a public data set"
    if isinstance(error, StopIteration):
        return NO_ROWS
    if "scripts are no longer supported" in text:
        return f"a script of its own makes its rows, which is not run; {BY_FILES}"
    if type(error).__name__ in ("DataFilesNotFoundError", "EmptyDatasetError"):
        return "there are no data files in it that `datasets` knows"
    if re.search("Unrecognized instruction format|corresponds to no data|slice boundaries", text):
        return (
            "no part of a split that `datasets` knows, or an empty one; a slice is such as train[:1000] or train[9%:]"
        )
    if Path(name).is_dir() and (fault := _first_fault(Path(name))):
        return fault
    # `datasets` says only that something happened, and has the reason behind it.
    text = " ".join(f"{type(causes[-1]).__name__}: {causes[-1]}".split())
    return f"cannot be prepared ({text}); {BY_FILES}"


def _files_in_no_split(folder: Path, data_files: Mapping[str, Sequence[str]] | None) -> list[str]:
    """A folder's files of the kinds that are read which are in no split: `datasets` leaves out what is called neither
    train nor anything else that it knows, where others are."""
    read = {Path(file).resolve() for files in (data_files or {}).values() for file in files}
    kinds = {file.suffix for file in read}
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix in kinds and path.resolve() not in read]
    return [path.relative_to(folder).as_posix() for path in paths if not path.name.startswith(".")]


def _first_fault(folder: Path) -> str | None:
    """What our own reader finds broken in its JSON files, with file:line, which `datasets` does not name."""
    for path in sorted([*folder.rglob("*.json"), *folder.rglob("*.jsonl")]):
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            try:
                for source, record in read_json(file, path.as_posix()):
                    if isinstance(record, Unusable):
                        return f"{source}: {record.reason}: {record.detail}"
            except UserError as error:
                return str(error)
    return None


def _decoder(feature: object) -> Callable | None:
    """Decodes what is JSON in a value, as values are kept whose types differ from row to row; None where nothing is."""
    from datasets import Json

    if isinstance(feature, Json):
        return lambda text: None if text is None else json.loads(text)
    if isinstance(feature, dict):
        decoders = {name: decoder for name, part in feature.items() if (decoder := _decoder(part))}
        return partial(_decode_fields, decoders) if decoders else None
    decoder = _decoder(feature.feature) if hasattr(feature, "feature") else None
    return decoder and (lambda items: None if items is None else [decoder(item) for item in items])


def _decode_fields(decoders: Mapping[str, Callable], values: dict | None) -> dict | None:
    return values and values | {name: decoder(values[name]) for name, decoder in decoders.items()}
