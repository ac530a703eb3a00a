"""The text that the embedded base model reads: documents drawn from the knowledge base, without what is held out."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from medtune.sample_data.corpus_forms import FORMS, Composer, Shelf
from medtune.sample_data.evaluation import NEAR_COPY, NGRAM, ngrams, spoken_text
from medtune.sample_data.knowledge import Entry, Knowledge, choose_unseen, read_lines, seeded

# Their answers are compared with the guide's, so that neither they nor the answers are read.
GUIDE_QUESTIONS = (
    "感冒了应该怎么办？",
    "高血压患者在饮食上需要注意什么？",
    "糖尿病有哪些早期症状？",
    "如何预防心血管疾病？",
)  # fmt: skip


class HeldOut:
    """Names that no document may hold, and texts that no document may nearly hold."""

    def __init__(self, names: Iterable[str], texts: Iterable[str]):
        self.names = re.compile("|".join(map(re.escape, sorted(names))), re.IGNORECASE)
        self.texts = list(dict.fromkeys(texts))
        self.sizes: list[int] = []
        self.texts_with: dict[str, list[int]] = defaultdict(list)
        for number, text in enumerate(self.texts):
            runs = ngrams(text)
            self.sizes.append(len(runs))
            for run in runs:
                self.texts_with[run].append(number)

    def overlap(self, document: str) -> tuple[float, str]:
        """The largest share of one text's runs of eight characters that the document has, and that text."""
        hits = Counter(number for run in ngrams(document) for number in self.texts_with.get(run, ()))
        return max(
            ((n_runs / self.sizes[number], self.texts[number]) for number, n_runs in hits.items()), default=(0.0, "")
        )


def read_held_out(knowledge: Knowledge, eval_dir: Path) -> HeldOut:
    """The conditions for continued pretraining, the items of data/eval, and the guide's questions with their answers.

    An item counts by its question and as a whole: what it asks for is in the corpus, in other words.
    """
    unseen = choose_unseen(knowledge)
    names = [name for entry in knowledge.entries if entry.fields["id"] in unseen for name in entry.names]
    texts = [*GUIDE_QUESTIONS]
    for dialogue in knowledge.dialogues:
        turns = [turn["value"] for turn in dialogue["conversations"]]
        if turns[0] in GUIDE_QUESTIONS:
            texts += turns
    for path in sorted(eval_dir.glob("*.jsonl")):
        for item in read_lines(path):
            if "response_chosen" in item:
                item |= {"history": []}
            question = item["question"] if "question" in item else item["conversations"][0]["value"]
            texts += [question, spoken_text(item)]
    return HeldOut(names, texts)


@dataclass
class CorpusCounts:
    """What was drawn; `nearest` is the largest share of a held-out text that a document has, with that text."""

    n_documents: int = 0
    n_characters: int = 0
    drawn_again: Counter = field(default_factory=Counter)
    nearest: tuple[float, str] = (0.0, "")

    def __str__(self) -> str:
        why = ", ".join(f"{n_times:,} {reason}" for reason, n_times in sorted(self.drawn_again.items()))
        return (
            f"{self.n_documents:,} documents, {self.n_characters:,} characters; drawn again: {why or 'none'}; "
            f"nearest to what is held out: {self.nearest[0]:.3f} of the runs of {NGRAM} "
            f"characters of {self.nearest[1]!r}"
        )


def shelves_of(knowledge: Knowledge, folder: Path) -> list[Shelf]:
    """What the corpus tells, by language: the entries without the unseen conditions, and those for it alone."""
    forms = json.loads((folder / "corpus_forms.json").read_text(encoding="utf-8"))
    unseen = choose_unseen(knowledge)
    entries = [entry for entry in knowledge.entries if entry.fields["id"] not in unseen]
    entries += map(Entry, read_lines(folder / "more_conditions.jsonl"))
    seeded("corpus").shuffle(entries)
    return [Shelf(language, [e for e in entries if e.language == language], forms[language]) for language in forms]


def draw_corpus(shelves: list[Shelf], held_out: HeldOut, counts: CorpusCounts, n_documents: int) -> Iterator[str]:
    """The documents, about each entry equally often; one that tells of what is held out is drawn again."""
    turns = [(shelf, entry) for shelf in shelves for entry in shelf.entries]
    seen: set[str] = set()
    for number in count():
        rng = seeded("corpus", number)
        shelf, entry = turns[number % len(turns)]
        (form,) = rng.choices(list(FORMS), FORMS.values())
        document = form(Composer(shelf, entry, rng))
        if document is None:
            fault = "in a form that does not suit the entry"
        elif document in seen:
            fault = "the same as another"
        elif held_out.names.search(document):
            fault = "with a held-out name"
        elif (nearest := held_out.overlap(document))[0] >= NEAR_COPY:
            fault = "too near to an item of the evaluation"
        else:
            seen.add(document)
            counts.n_documents += 1
            counts.n_characters += len(document)
            counts.nearest = max(counts.nearest, nearest)
            yield document
            if counts.n_documents == n_documents:
                return
            continue
        counts.drawn_again[fault] += 1
