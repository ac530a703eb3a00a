"""The knowledge base in data/knowledge: entries, ways to ask about them, and replies in several wordings."""

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from medtune.errors import UserError

DATA_SEED = 20240601
N_UNSEEN_CONDITIONS = 15

# The wordings of a reply in phrasings.json: of dialogues and pairs; of held-out pairs; of pairs alone.
TRAINED, HELD_OUT, REWORDED = 0, 1, (2, 3)

CONDITION_ASPECTS = (
    "overview", "causes", "symptoms", "examinations", "treatment", "medicines", "diet_and_care", "prevention",
    "red_flags", "department", "advice",
)  # fmt: skip
MEDICINE_ASPECTS = (
    "overview", "uses", "how_to_take", "side_effects", "not_for", "interactions", "diet_and_care", "red_flags",
    "overdose", "dose",
)  # fmt: skip
# Aspects with another text if a condition's complaints call for an ambulance.
URGENT_FRAMES = {"urgent_advice", "urgent_department", "urgent_examinations", "urgent_red_flag"}
# Steps, and signs of which the first weigh most.
IN_ORDER = {"treatment", "first_aid", "how_to_take", "red_flags"}
IMPERATIVES = {"diet_and_care", "prevention", "first_aid", "how_to_take"}


class Clauses(list):
    """Clauses of an entry, which format as one enumeration and index as a list."""

    def __init__(self, clauses: Iterable[str], joined: str):
        super().__init__(clauses)
        self.joined = joined

    def __format__(self, spec: str) -> str:
        return self.joined


@dataclass(frozen=True)
class Entry:
    """A condition or a medicine in one language, with its fields as in conditions.jsonl."""

    fields: dict
    more_complaints: Sequence[str] = ()  # in further words, to learn from; in no text for the base model

    @property
    def key(self) -> str:
        return f"{self.fields['language']}:{self.fields['id']}"

    @property
    def language(self) -> str:
        return self.fields["language"]

    @property
    def is_medicine(self) -> bool:
        return self.fields["kind"] == "medicine"

    @property
    def names(self) -> list[str]:
        return [self.fields["name"], *self.fields["aliases"]]

    @property
    def aspects(self) -> tuple[str, ...]:
        return MEDICINE_ASPECTS if self.is_medicine else CONDITION_ASPECTS


@dataclass(frozen=True)
class Knowledge:
    """All of data/knowledge."""

    entries: list[Entry]
    phrasings: dict
    safety: list[dict]
    safety_twins: list[dict]
    bad_replies: dict
    dialogues: list[dict]
    emergency_twins: list[dict]
    unsafe_requests: list[dict]
    everyday_questions: list[dict]
    more_entries: list[Entry]  # to read of and to ask about, of which no evaluation file tells
    corpus_forms: dict

    def questions(self, entry: Entry, aspect: str, part: str) -> list[str]:
        """Ways to ask about an aspect, "train" or "held_out", with the name left open as {n}."""
        phrasings = self.phrasings[entry.language]
        own = phrasings["medicine_questions"] if entry.is_medicine else {}
        return own.get(aspect, phrasings["questions"][aspect])[part]

    def reply(
        self, entry: Entry, frame: str, wording: int = TRAINED, rng: random.Random | None = None, **values: str
    ) -> str:
        """An answer about an entry in one of its wordings, with `rng` also in another order."""
        if not entry.is_medicine and entry.fields["urgent"] and f"urgent_{frame}" in URGENT_FRAMES:
            frame = f"urgent_{frame}"
        if frame == "complaint" and entry.fields["first_aid"]:
            frame = "first_aid_complaint"
        phrasings = self.phrasings[entry.language]
        frames = phrasings["medicine_replies" if entry.is_medicine else "replies"]
        return frames[frame][wording].format(**_values(entry, rng), **values)


def _values(entry: Entry, shuffled: random.Random | None) -> dict:
    """The fields of an entry as the frames of replies take them."""
    values = {}
    for name, value in entry.fields.items():
        if isinstance(value, list) and name not in {"follow_up", "complaints"}:
            value = list(value)
            if shuffled and name not in IN_ORDER:
                shuffled.shuffle(value)
            if name == "medicines":
                form = "{name}，{caution}" if entry.language == "zh" else "{name} ({caution})"
                value = [form.format(**medicine) for medicine in value]
            value = Clauses(value, joined(value, name, entry.language))
        values[name] = value
    return values


def joined(clauses: Sequence[str], field: str, language: str) -> str:
    if language == "zh":
        return {"treatment": ""}.get(field, "；" if field in IMPERATIVES | {"medicines"} else "、").join(clauses)
    if field == "treatment":
        return " ".join(clauses)
    if field in IMPERATIVES | {"medicines"}:
        return "; ".join(clauses)
    return ", ".join(clauses[:-1]) + " and " + clauses[-1] if len(clauses) > 1 else "".join(clauses)


def read_knowledge(folder: Path) -> Knowledge:
    """Read data/knowledge; raises UserError for a file that is missing."""
    missing = [name for name in ("conditions.jsonl", "phrasings.json") if not (folder / name).is_file()]
    if missing:
        raise UserError(f"--data_dir {folder.parent}: {folder} has no {' and no '.join(missing)}")
    complaints = {(of["language"], of["id"]): of["complaints"] for of in read_lines(folder / "more_complaints.jsonl")}
    return Knowledge(
        entries=[
            Entry(record, complaints.get((record["language"], record["id"]), ()))
            for record in read_lines(folder / "conditions.jsonl")
        ],
        phrasings=json.loads((folder / "phrasings.json").read_text(encoding="utf-8")),
        safety=read_lines(folder / "safety.jsonl"),
        safety_twins=read_lines(folder / "safety_twins.jsonl"),
        bad_replies=json.loads((folder / "bad_replies.json").read_text(encoding="utf-8")),
        dialogues=read_lines(folder / "dialogues.jsonl"),
        emergency_twins=read_lines(folder / "emergency_twins.jsonl"),
        unsafe_requests=read_lines(folder / "unsafe_requests.jsonl"),
        everyday_questions=read_lines(folder / "everyday_questions.jsonl"),
        more_entries=[Entry(record) for record in read_lines(folder / "more_conditions.jsonl")],
        corpus_forms=json.loads((folder / "corpus_forms.json").read_text(encoding="utf-8")),
    )


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def seeded(*what: object) -> random.Random:
    """A random generator for each item, so that new entries do not change the others."""
    return random.Random(":".join(map(str, (DATA_SEED, *what))))


def choose_unseen(knowledge: Knowledge) -> set[str]:
    """The ids of the conditions that are only in the pretraining text, and in no other entry or dialogue."""
    entries = knowledge.entries
    texts = {entry.fields["id"]: "" for entry in entries}
    for entry in entries:
        texts[entry.fields["id"]] += json.dumps(entry.fields, ensure_ascii=False).lower()
    spoken = json.dumps([knowledge.dialogues, knowledge.safety], ensure_ascii=False).lower()
    names = defaultdict(list)
    for entry in entries:
        names[entry.fields["id"]] += [name.lower() for name in entry.names]

    def is_mentioned(condition: str) -> bool:
        elsewhere = [spoken, *(text for other, text in texts.items() if other != condition)]
        return any(name in text for name in names[condition] for text in elsewhere)

    candidates = sorted({e.fields["id"] for e in entries if not e.is_medicine and not e.fields["urgent"]})
    seeded("unseen").shuffle(candidates)
    return set([condition for condition in candidates if not is_mentioned(condition)][:N_UNSEEN_CONDITIONS])
