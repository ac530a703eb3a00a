"""Write outputs whole or not at all: under a temporary name in the same folder, then renamed.

    with new_text_file(Path("data/finetune/train.jsonl"), "--output", overwrite=False) as file:
        file.write("...")

A failed run leaves the earlier output. A killed run leaves a hidden `.NAME.partial`, which no stage reads and the
next run replaces.
"""

import errno
import gzip
import io
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TextIO

from medtune.errors import UserError

# In each folder that a tool with --overwrite made: only such a folder is ever replaced.
MADE_BY_A_TOOL = ".made_by_a_tool"


@contextmanager
def new_text_file(path: Path, flag: str, overwrite: bool | None, keep_partial: bool = False) -> Iterator[TextIO]:
    """Open a new UTF-8 file, compressed if its name ends in `.gz`; it appears when the block ends without error.

    Args:
        overwrite: None where the tool has no such flag.
        keep_partial: if the block fails, keep what was written as `NAME.partial`.

    Raises UserError, naming `flag`, if `path` is a folder, cannot be written, or exists without `overwrite`.
    """
    place, partial = _place_and_partial(path)
    if keep_partial:
        partial = place.with_name(f"{place.name}.partial")
    with _explained(path, partial, flag):
        if place.is_dir():
            raise UserError(f"{flag} {path}: a folder; name the file to write")
        if place.exists() and overwrite is None:
            raise UserError(f"{flag} {path}: it exists and is not written over; name another file or move it")
        if place.exists() and not overwrite:
            raise UserError(f"{flag} {path}: exists already; name another file, or pass --overwrite to replace it")
        partial.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _open(partial, compress=place.suffix.lower() == ".gz") as file:
                yield file
            partial.replace(place)
        finally:
            if not (keep_partial and partial.exists() and partial.stat().st_size):
                partial.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, flag: str, overwrite: bool | None) -> Iterator[Path]:
    """An empty folder to write into; it becomes `path` when the block ends without error.

    Args:
        overwrite: None where the tool has no such flag; then no other tool may replace the folder either.

    Raises UserError, naming `flag`, if `path` is a file, cannot be written, or is not empty: with `overwrite`,
        only a folder made by `new_folder` is replaced.
    """
    place, partial = _place_and_partial(path)
    with _explained(path, partial, flag):
        if overwrite is None and place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise UserError(f"{flag} {path}: it holds something already; name a new folder")
        if place.exists() and not place.is_dir():
            raise UserError(f"{flag} {path}: a file; name the folder to write")
        if place.is_dir() and any(place.iterdir()):
            if not overwrite:
                raise UserError(f"{flag} {path}: is not empty; name another folder, or pass --overwrite to replace it")
            if not Path(place, MADE_BY_A_TOOL).is_file():
                raise UserError(f"{flag} {path}: holds files that no tool here made; name another folder")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            if overwrite is not None:
                Path(partial, MADE_BY_A_TOOL).touch()
            if place.exists():
                shutil.rmtree(place)
            partial.replace(place)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def refuse_unwritable(folder: Path, flag: str) -> None:
    """Raise UserError, naming `flag`, where the folder, or the one it would be made in, takes no files.

    It is tried, since to root every folder seems writable, one of /proc too.
    """
    try:
        link = next((path for path in (folder, *folder.absolute().parents) if path.is_symlink()), folder)
        if link.is_symlink() and not link.exists():
            raise UserError(f"{flag} {folder}: {link} is a link that leads nowhere; name another folder")
        existing = existing_part(folder)
        if existing.is_file():
            raise UserError(f"{flag} {folder}: {existing} is a file; name a folder")
        with TemporaryDirectory(prefix=".", dir=existing) as tried:
            Path(tried, "file").touch()
    except OSError as error:
        raise UserError(
            f"{flag} {folder}: cannot be made or written to ({error.strerror}); name another folder"
        ) from None


def existing_part(folder: Path) -> Path:
    """The folder, or the one above it that is there."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def refuse_same(input_files: Iterable[Path], output: Path, flag: str) -> None:
    """Raise UserError, naming `flag`, if the output is one of the inputs or a folder that holds one.

    What is no path, as a split of a data set, is no file that could be overwritten.
    """
    place = output.resolve()
    for file in (file for file in input_files if isinstance(file, Path)):
        source = file.resolve()
        if source == place or (place.is_file() and place.samefile(source)):
            raise UserError(f"{flag} {output}: is among the files to read; write to another place")
        if place in source.parents:
            raise UserError(f"{flag} {output}: holds {file}, which is to be read; write to another folder")


def _place_and_partial(path: Path) -> tuple[Path, Path]:
    """The output path with links resolved, and a hidden temporary path in the same folder."""
    place = path.resolve()
    return place, place.parent / f".{place.name}.partial"


@contextmanager
def _open(partial: Path, compress: bool) -> Iterator[TextIO]:
    with partial.open("wb") as raw:
        # No name and no time in the gzip header: the same text gives the same bytes.
        target = gzip.GzipFile("", "wb", 6, raw, mtime=0) if compress else raw
        with io.TextIOWrapper(target, encoding="utf-8", newline="\n") as file:
            yield file


_REFUSALS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EFBIG),
}


@contextmanager
def _explained(path: Path, partial: Path, flag: str) -> Iterator[None]:
    """Turn an OSError of the output into one line; errors of other files are raised unchanged."""
    try:
        yield
    except OSError as error:
        # A write that fails names no file.
        about = Path(error.filename) if error.filename is not None else partial
        concerns_output = partial.is_relative_to(about) or about.is_relative_to(partial)
        if error.errno not in _REFUSALS or not (concerns_output or about == path.resolve()):
            raise
        raise UserError(f"{flag} {path}: cannot be written ({error.strerror})") from None
