"""Find the files that a flag names, read or left unread, and fingerprint their content."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from medtune.errors import UserError
from medtune.reading.hub_data import HubSplit, load_splits

RECORD_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")

TEXT_ENDINGS = (".txt", *RECORD_ENDINGS)

RecordFile = Path | HubSplit


def find_records(
    path: str | Path | None,
    dataset_name: str | None,
    flag: str,
    endings: Sequence[str] = RECORD_ENDINGS,
    cache_dir: str | None = None,
) -> tuple[list[RecordFile], list[Path] | list[str]]:
    """What a tool reads and what it leaves: `find_files`, or the split that --dataset_name names and its `others`."""
    if dataset_name is None:
        return find_files(path, flag, endings)
    split, _ = load_splits(dataset_name, cache_dir)
    return [split], [*split.others]


def find_files(path: str | Path, flag: str, endings: Sequence[str] = RECORD_ENDINGS) -> tuple[list[Path], list[Path]]:
    """List the files to read at `path` (a file, or a folder and all below it), and those left unread.

    Both lists are sorted; hidden files are in neither. A text file may be compressed, as `train.jsonl.gz`.
    Raises UserError, naming `flag`, if none can be read.
    """
    if not str(path):
        raise UserError(f"{flag} is empty: name a file or folder")
    path = Path(path)
    if path.is_file():
        candidates = [path]
    elif path.is_dir():
        candidates = []
        # os.walk rather than rglob: data folders on servers are often linked in from another disk.
        for folder, subfolders, names in os.walk(path, followlinks=True):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            for link in (link for name in subfolders if (link := Path(folder, name)).is_symlink()):
                if Path(folder).resolve().is_relative_to(link.resolve()):
                    raise UserError(f"{flag} {path}: {link} leads back to a folder that it is in; remove this link")
            candidates += [Path(folder, name) for name in names if not name.startswith(".")]
    else:
        raise UserError(f"{flag} {path}: no such file or folder")

    files = sorted(file for file in candidates if ending_of(file) in endings)
    unread = sorted(set(candidates).difference(files))
    if not files:
        what_is_there = f"found only {some_names(unread)}" if unread else "the folder is empty"
        raise UserError(f"{flag} {path}: {what_is_there}; files that end in {', '.join(endings)} are read")
    if dangling := [file for file in files if not file.exists()]:
        raise UserError(f"{flag} {path}: {dangling[0]} is a link to a file that is not there; copy or download it")
    return files, unread


def ending_of(path: RecordFile) -> str:
    """The suffix that decides how a file is read; `.gz` of compressed text is left out. A split is a table."""
    if isinstance(path, HubSplit):
        return ".parquet"
    suffix, inner = path.suffix.lower(), Path(path.stem).suffix.lower()
    return inner if suffix == ".gz" and inner != ".parquet" else suffix


def content_fingerprint(files: Sequence[RecordFile]) -> str:
    """SHA-256 over the names (as `Dialogue.source` shows them) and the bytes of the files, in their order."""
    lines = [f"{display_path(path)}\0{sha256_of(path)}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def sha256_of(path: RecordFile) -> str:
    if isinstance(path, HubSplit):
        return path.sha256()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def display_path(path: RecordFile) -> str:
    """The path for messages: relative to the working directory if it is below it."""
    if isinstance(path, HubSplit):
        return path.name
    path = path.absolute()
    return (path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path).as_posix()


def some_names(paths: Sequence[RecordFile]) -> str:
    """The first five names, and how many more there are."""
    names = ", ".join(path.name for path in paths[:5])
    return names if len(paths) <= 5 else f"{names} and {len(paths) - 5} more"


def are_same_files(train_files: Sequence[RecordFile], eval_files: Sequence[RecordFile], eval_path: str) -> bool:
    """Whether both lists name the same files; raises UserError if only some are the same."""
    train, evaluated = ({file.resolve() for file in files} for files in (train_files, eval_files))
    if train != evaluated and train & evaluated:
        raise UserError(
            f"--validation_file_dir {eval_path}: {min(train & evaluated)} is among the training files too; keep "
            "them apart, or name the same folder for both and a part is held out"
        )
    return train == evaluated
