"""The sources of records by number, in a temporary file, since millions would fill the memory."""

from itertools import islice
from tempfile import TemporaryFile


class Sources:
    """A list of lines to append to, and to look a few up in."""

    def __init__(self):
        self._file = TemporaryFile("w+", encoding="utf-8", newline="\n")  # noqa: SIM115 - open as long as this is

    def add(self, source: str) -> None:
        self._file.write(f"{source}\n")

    def __getitem__(self, number: int) -> str:
        """Reads the file from its start, for the few sources that are printed."""
        self._file.seek(0)
        line = next(islice(self._file, number, None))
        self._file.seek(0, 2)
        return line.rstrip("\n")
