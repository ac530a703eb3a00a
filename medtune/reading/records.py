"""What a record becomes: a dialogue, a pair, a document or a prompt; or a bad record, counted in a report."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Self, TypeVar

from medtune.errors import UserError
from medtune.reading.exams import SAME_OPTIONS, Exam

T = TypeVar("T")
# Why a record that can be read is left out, always counted; every other reason is a fault that --on_bad_data decides
# about.
LEFT_OUT = (
    *("too long", "prompt too long", "reply too long", "same within the limit", "same answers", "same prompt"),
    *("several right answers", SAME_OPTIONS),
)
# Of each reason so many details are kept, and of each detail so many places.
N_DETAILS, N_PLACES = 10, 3


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
class Question(Dialogue):
    """A dialogue whose questions are prompts for reinforcement learning; the last reply may be missing.

    exam: where its last question is one with options; rest: keys of the record that are no part of the dialogue.
    """

    exam: Exam | None = None
    rest: dict = field(default_factory=dict)


@dataclass(slots=True)
class Prompt:
    """A prompt for reinforcement learning: messages that end with a user turn; `reply` is the data's own, or "".

    exam, rest: those of the `Question`.
    """

    messages: list[dict]
    tools: list[dict] | None
    reply: str
    source: str
    exam: Exam | None = None
    rest: dict = field(default_factory=dict)


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used: its place, a reason to count by, and what to fix."""

    source: str
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}: {self.detail}"


class BadDataError(UserError):
    """Bad records that are not dropped: their lines, of one step of reading or of several, and what to do."""

    def __init__(self, refusals: Sequence[str], hint: str = "fix them, or go on without them: --on_bad_data drop"):
        super().__init__("\n".join([*refusals, hint]))
        self.refusals, self.hint = refusals, hint

    @classmethod
    def join(cls, errors: Sequence[Self]) -> Self:
        """Those of several parts of the data as one; what they share is said once."""
        refusals = dict.fromkeys(refusal for error in errors for refusal in error.refusals)
        return cls([*refusals], "\n".join(dict.fromkeys(error.hint for error in errors)))


@dataclass
class Report:
    """How many records were read, and how many dropped for which reason.

    A later step adds its own drops, or where it works on a part of the records starts its own `Report(read)`.

    faults: of a reason its details, each with the number of its records and the first of them.
    """

    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    faults: dict[str, dict[str, list]] = field(default_factory=dict)
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

    @property
    def faults_by_reason(self) -> Counter[str]:
        """Of the dropped records those that have a fault."""
        return Counter({reason: n for reason, n in self.dropped.items() if reason not in LEFT_OUT})

    def drop(self, bad: BadRecord) -> None:
        """Count a record as dropped, with others that have the very same fault."""
        self.dropped[bad.reason] += 1
        details = self.faults.setdefault(bad.reason, {})
        if bad.detail not in details and len(details) == N_DETAILS:
            return
        counted = details.setdefault(bad.detail, [0, []])
        counted[0] += 1
        if len(counted[1]) < N_PLACES:
            counted[1].append(bad.source)

    def examples(self, reason: str, limit: int = 3) -> list[str]:
        """The first faults of a reason, such as `d.jsonl:2, d.jsonl:7: turn 2 (assistant) is empty`."""
        return [f"{_listed(*counted)}: {detail}" for detail, counted in [*self.faults[reason].items()][:limit]]

    def refusal(self, kind: str, reasons: Collection[str]) -> str:
        """A line for each of the first ten faults of these reasons, the first of each reason before any second."""
        numbered = [
            (number, f"{_listed(*counted)}: {reason}: {detail}")
            for reason in self.faults
            if reason in reasons
            for number, (detail, counted) in enumerate(self.faults[reason].items())
        ]
        lines = [line for _, line in sorted(numbered, key=itemgetter(0))[:N_DETAILS]]
        n_bad = sum(self.dropped[reason] for reason in reasons)
        first = "; the first ten faults" if len(numbered) > len(lines) else ""
        return "\n".join([f"{n_bad} of {self.read} {kind} are bad{first}:", *(f"  {line}" for line in lines)])

    def summary(self) -> str:
        """One line, such as `kept 985 of 1000 (12 empty reply, 3 broken JSON)`."""
        line = f"kept {self.kept} of {self.read}"
        if self.dropped:
            line += f" ({', '.join(f'{count} {reason}' for reason, count in self.dropped.most_common())})"
        return line

    def as_dict(self) -> dict:
        """The report as JSON values, for the cache; `from_dict` reads it back."""
        return {"read": self.read, "dropped": dict(self.dropped), "faults": self.faults, "notes": self.notes}

    @classmethod
    def from_dict(cls, values: dict) -> "Report":
        return cls(values["read"], Counter(values["dropped"]), values["faults"], values["notes"])


def _listed(count: int, places: list[str]) -> str:
    """`d.jsonl:2, d.jsonl:5, d.jsonl:9 and 13 more`."""
    more = f" and {count - len(places):,} more" if count > len(places) else ""
    return f"{', '.join(places)}{more}"
