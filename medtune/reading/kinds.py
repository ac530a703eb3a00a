"""Which kind of records a folder holds: dialogues, pairs, labelled replies or documents."""

from itertools import islice
from pathlib import Path
from typing import Literal

from medtune.errors import UserError
from medtune.reading.finding import TEXT_ENDINGS, RecordFile, find_files
from medtune.reading.hub_data import HubSplit
from medtune.reading.keys import Reading
from medtune.reading.readers import read_dialogues, read_documents, read_feedback, read_pairs
from medtune.reading.records import BadRecord

Kind = Literal["dialogues", "pairs", "replies", "documents"]


READERS = {
    "dialogues": read_dialogues, "pairs": read_pairs, "replies": read_feedback, "documents": read_documents,
}  # fmt: skip

# Of a file whose first records are all faulty, so many are looked at.
_PROBED = 100

# Why a record is no dialogue, faulty or not.
_KINDS_BY_REASON: dict[str, Kind] = {"preference pair": "pairs", "plain text": "documents"}


def find_kind(
    path: str | Path, flag: str, ignore_keys: tuple[str, ...] = ()
) -> tuple[Kind, list[RecordFile], list[Path]]:
    """What the records at `path` are, the files that the stage for them reads, and those it does not.

    Lines of .txt files are documents where nothing else is there. Raises UserError where two kinds are mixed.
    """
    files, unread = find_files(path, flag, TEXT_ENDINGS)
    of_records = [file for file in files if not is_plain_text(file)]
    first_of_kind: dict[Kind, Path] = {}
    for file in of_records:
        if kind := _kind_of(file, ignore_keys):
            first_of_kind.setdefault(kind, file)
    if len(first_of_kind) > 1:
        listed = " and ".join(f"{kind} ({file})" for kind, file in first_of_kind.items())
        raise UserError(f"{flag} {path}: holds {listed}, which no stage reads together; name one of them")
    kind = next(iter(first_of_kind), "dialogues" if of_records else "documents")
    if kind == "documents":
        return kind, files, unread
    return kind, of_records, sorted([*unread, *(file for file in files if is_plain_text(file))])


def kind_of_split(split: HubSplit, ignore_keys: tuple[str, ...] = ()) -> tuple[Kind, list[RecordFile], list[str]]:
    """As `find_kind`, of a split of a data set."""
    return _kind_of(split, ignore_keys) or "dialogues", [split], [*split.others]


def is_plain_text(path: RecordFile) -> bool:
    return path.name.lower().endswith((".txt", ".txt.gz"))


def _kind_of(path: RecordFile, ignore_keys: tuple[str, ...]) -> Kind | None:
    """Replies if any of the first records is a labelled one, dialogues if any is one; otherwise the kind of the first
    one that has a kind."""
    kind = None
    try:
        feedback = islice(read_feedback([path], Reading(ignore_keys)), _PROBED)
        if not all(isinstance(result, BadRecord) for result in feedback):
            return "replies"
        for result in islice(read_dialogues([path], Reading(ignore_keys)), _PROBED):
            if not isinstance(result, BadRecord):
                return "dialogues"
            kind = kind or _KINDS_BY_REASON.get(result.reason)
    except UserError:  # whoever reads the whole file says what is wrong with it
        pass
    return kind
