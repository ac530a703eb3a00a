"""What a record becomes: a dialogue, a pair, a document or a prompt; or a bad record, counted in a report."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


@dataclass(slots=True)  # frozen, a record would take as long to make as to check
class Dialogue:
    """A usable dialogue: an optional system turn, then user, tool and assistant turns, ending with a reply.

    A message is `{"role": "system" | "user" | "assistant" | "tool", "content": str}`; an assistant's may add
    `"tool_calls": [{"name": str, "arguments": dict}]`, and `"weight": 0` where it is there to be read and not learned.
    Contents are stripped: a space between the assistant header and the reply gives other tokens in training than in
    generation. Line ends are `\\n`.
    """

    messages: list[dict]
    tools: list[dict] | None
    source: str


@dataclass(slots=True)
class Document:
    """One text to continue pretraining on, stripped, in one piece."""

    text: str
    source: str


@dataclass(slots=True)
class Pair:
    """Two replies to one prompt, which is messages that end with a user turn.

    `margin` is by how much the chosen reply is better, None if the record has none.
    """

    messages: list[dict]
    chosen: str
    rejected: str
    margin: float | None
    source: str
    tools: list[dict] | None = None


@dataclass(slots=True)
class Feedback:
    """One reply to a prompt (messages that end with a user turn), and whether it is a good one."""

    messages: list[dict]
    reply: str
    is_desirable: bool
    source: str
    tools: list[dict] | None = None


@dataclass(slots=True)
class Prompt:
    """A prompt for PPO: messages that end with a user turn; `reply` is the data's own, or ""."""

    messages: list[dict]
    tools: list[dict] | None
    reply: str
    source: str


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used: its place, a reason to count by, and what to fix."""

    source: str
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}: {self.detail}"


@dataclass
class Report:
    """How many records were read, and how many dropped for which reason.

    A later step adds its own drops, or where it works on a part of the records starts its own `Report(read)`.
    """

    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what was met in them, a line each

    @property
    def kept(self) -> int:
        return self.read - self.dropped.total()

    def usable(self, results: Iterable[T | BadRecord]) -> Iterator[T]:
        """The results that are no bad records; all are counted."""
        for result in results:
            self.read += 1
            if isinstance(result, BadRecord):
                self.drop(result)
            else:
                yield result

    def drop(self, bad: BadRecord) -> None:
        """Count a record as dropped; the first three of each reason are kept as examples."""
        self.dropped[bad.reason] += 1
        examples = self.examples.setdefault(bad.reason, [])
        if len(examples) < 3:
            examples.append(f"{bad.source}: {bad.detail}")

    def summary(self) -> str:
        """One line, such as `kept 985 of 1000 (12 empty reply, 3 broken JSON)`."""
        line = f"kept {self.kept} of {self.read}"
        if self.dropped:
            line += f" ({', '.join(f'{count} {reason}' for reason, count in self.dropped.most_common())})"
        return line

    def as_dict(self) -> dict:
        """The report as JSON values, for the cache; `from_dict` reads it back."""
        return {"read": self.read, "dropped": dict(self.dropped), "examples": self.examples, "notes": self.notes}

    @classmethod
    def from_dict(cls, values: dict) -> "Report":
        return cls(values["read"], Counter(values["dropped"]), values["examples"], values["notes"])
