"""The text that the embedded base model reads: documents drawn from the knowledge base, without what is held out."""

import re
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from medtune.sample_data.corpus_forms import FORMS, Composer, DocumentForm, Shelf
from medtune.sample_data.evaluation import NEAR_COPY, NGRAM, ngrams, spoken_text
from medtune.sample_data.knowledge import Knowledge, choose_unseen, read_lines, seeded

# Their answers are compared with the guide's, so that neither they nor the answers are read.
GUIDE_QUESTIONS = (
    "感冒了应该怎么办？",
    "高血压患者在饮食上需要注意什么？",
    "糖尿病有哪些早期症状？",
    "如何预防心血管疾病？",
)  # fmt: skip
NOTHING = r"(?!)"  # matches no text


class HeldOut:
    """Names that no document may hold, and texts that no document may nearly hold."""

    def __init__(self, names: Iterable[str], texts: Iterable[str]):
        self.names = re.compile("|".join(map(re.escape, sorted(names))) or NOTHING, re.IGNORECASE)
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
    """The conditions for continued pretraining, the items of data/eval, the guide's questions and their answers."""
    unseen = choose_unseen(knowledge)
    names = [name for entry in knowledge.entries if entry.fields["id"] in unseen for name in entry.names]
    texts = [*GUIDE_QUESTIONS]
    for dialogue in knowledge.dialogues:
        turns = [turn["value"] for turn in dialogue["conversations"]]
        if turns[0] in GUIDE_QUESTIONS:
            texts += turns
    items = [item for path in sorted(eval_dir.glob("*.jsonl")) for item in read_lines(path)]
    return HeldOut(names, texts + texts_of(items))


def texts_of(items: Iterable[dict]) -> list[str]:
    """The question of each item of the evaluation and all its words: what it asks for is read, in other words."""
    texts = []
    for item in items:
        if "response_chosen" in item:
            item = item | {"history": []}
        texts += [item["question"] if "question" in item else item["conversations"][0]["value"], spoken_text(item)]
    return texts


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


def shelves_of(knowledge: Knowledge, left_out: Container[str]) -> list[Shelf]:
    """What the documents tell, by language: all entries but those of these ids."""
    entries = [entry for entry in knowledge.entries if entry.fields["id"] not in left_out] + knowledge.more_entries
    seeded("corpus").shuffle(entries)
    forms = knowledge.corpus_forms
    return [Shelf(language, [e for e in entries if e.language == language], forms[language]) for language in forms]


def draw_corpus(
    shelves: list[Shelf],
    held_out: HeldOut,
    counts: CorpusCounts,
    n_documents: int,
    about: Container[str] | None = None,
    forms: Mapping[DocumentForm, float] = FORMS,
    seed: str = "corpus",
) -> Iterator[str]:
    """The documents, about each entry equally often; one that tells of what is held out is drawn again.

    about: ids of entries, None for all of the shelves'. forms: those to choose from, each with its weight.
    """
    turns = [
        (shelf, entry) for shelf in shelves for entry in shelf.entries if about is None or entry.fields["id"] in about
    ]
    seen: set[str] = set()
    for number in count():
        rng = seeded(seed, number)
        shelf, entry = turns[number % len(turns)]
        (form,) = rng.choices(list(forms), forms.values())
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
