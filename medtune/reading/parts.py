"""What a stage's flags name as its training and its evaluation data."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from medtune.arguments import DataArguments
from medtune.errors import UserError
from medtune.reading.finding import RecordFile, are_same_files, find_files
from medtune.reading.hub_data import DATASET_FLAG, HubSplit, load_splits, parse_name

PartName = Literal["train", "eval"]


@dataclass(frozen=True)
class Listing:
    """The files of one part of the data, or its split.

    named: the flag and its value.
    unread: files of other endings.
    """

    named: str
    files: list[RecordFile]
    unread: list[Path] = field(default_factory=list)

    def describe(self, part: PartName) -> dict[str, str]:
        """Name and value of a line of the log."""
        if isinstance(split := self.files[0], HubSplit):
            others = f", {len(split.rows):,} rows; not read: {', '.join(split.others)}" if split.others else ""
            return {f"{part} split": f"{split.name}{others}"}
        not_read = f", {len(self.unread)} with other endings not read" if self.unread else ""
        return {f"{part} files": f"{len(self.files)} in {self.named.partition(' ')[2]}{not_read}"}


def find_parts(
    data_args: DataArguments, do_eval: bool, kind: str, endings: Sequence[str], cache_dir: str | None
) -> tuple[dict[PartName, Listing], bool]:
    """The training data and, with `do_eval`, the evaluation data; and whether the second is held out of the first.

    Of a data set the evaluation data is its own split for it, where it has one and no files are named.

    Args:
        kind: what the records are called.
        endings: of the files that hold such records.

    Raises:
        UserError: a flag is missing or names nothing that can be read, or both name some of the same files.
    """
    eval_path = data_args.validation_file_dir
    if data_args.dataset_name is not None:
        split, validation = load_splits(data_args.dataset_name, cache_dir)
        train = Listing(f"{DATASET_FLAG} {data_args.dataset_name}", [split])
        evaluation = Listing(train.named, [validation or split])
    elif data_args.train_file_dir is not None:
        train = evaluation = _list_files("--train_file_dir", data_args.train_file_dir, endings)
    else:
        raise UserError(f"--train_file_dir is missing: name the file or folder of the {kind}; or give {DATASET_FLAG}")
    if not do_eval:
        return {"train": train}, False
    if eval_path is not None:
        evaluation = _list_files("--validation_file_dir", eval_path, endings)
        if data_args.dataset_name is not None:
            _refuse_files_of_folder(Path(parse_name(data_args.dataset_name)[0]), evaluation)
    held_out = are_same_files(train.files, evaluation.files, eval_path or "")
    return {"train": train, "eval": evaluation}, held_out


def _list_files(flag: str, path: str, endings: Sequence[str]) -> Listing:
    return Listing(f"{flag} {path}", *find_files(path, flag, endings))


def _refuse_files_of_folder(folder: Path, evaluation: Listing) -> None:
    """Files of the folder that is read as a data set might be among its rows."""
    if folder.is_dir() and any(file.resolve().is_relative_to(folder.resolve()) for file in evaluation.files):
        raise UserError(
            f"{evaluation.named}: lies in the folder of {DATASET_FLAG}; leave it out, and the set's validation split "
            "or a part that is held out is taken, or name files of another folder"
        )
