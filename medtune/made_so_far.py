"""What a long tool has made so far, beside its output, so that a run that died goes on where it stopped."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from medtune.errors import UserError


class MadeSoFar:
    """The parts that are made of an output, each of them JSON, in a hidden `.NAME.made_so_far` in the output's folder.

    parts: in their order; file: where they are.
    """

    def __init__(self, output: Path, flag: str, settings: Mapping[str, object]):
        """Raises UserError, naming `flag`, if the parts that are there were made with other settings."""
        place = output.resolve()
        self.file = place.with_name(f".{place.name}.made_so_far")
        written = self.file.read_bytes() if self.file.is_file() else b""
        whole, *_ = written.rpartition(b"\n")
        self.parts: list = []
        self._first = json.dumps(settings)
        if not whole:
            self.file.unlink(missing_ok=True)
            return
        os.truncate(self.file, len(whole) + 1)  # a killed run leaves half a line
        before, *self.parts = map(json.loads, whole.split(b"\n"))
        for name, value in json.loads(self._first).items():
            if before.get(name) != value:
                raise UserError(
                    f"{flag} {output}: a run that was interrupted had {name} {before.get(name)} and not {value}: give "
                    f"the same to go on, or delete {self.file} to start anew"
                )

    def add(self, part: object) -> None:
        """Keep what was made next."""
        is_new = not self.file.exists()
        with self.file.open("a", encoding="utf-8") as file:
            file.write((f"{self._first}\n" if is_new else "") + json.dumps(part) + "\n")
        self.parts.append(part)

    def delete(self) -> None:
        self.file.unlink(missing_ok=True)
