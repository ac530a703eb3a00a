"""Questions and safety items that no training record nearly holds, and what that means."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from difflib import SequenceMatcher

from medtune.sample_data.knowledge import Entry, Knowledge, seeded
from medtune.sample_data.learned import dialogue

# An item is a near copy when one training record holds this share of its runs of eight characters.
NGRAM = 8
NEAR_COPY = 0.5
# A question is nearly another when difflib finds them as like as this, however short they are.
LIKE_QUESTIONS = 0.85


def bare(text: str) -> str:
    return re.sub(r"[\W_]+", "", text.lower())


def ngrams(text: str) -> set[str]:
    """The runs of eight letters or digits of a text, without blanks, punctuation and case."""
    text = bare(text)
    return {text[start : start + NGRAM] for start in range(max(1, len(text) - NGRAM + 1))}


class TrainingText:
    """Measures how much of a text is in a single training record."""

    def __init__(self, records: Iterable[str]):
        self.records_with: dict[str, list[int]] = defaultdict(list)
        for number, record in enumerate(records):
            for ngram in ngrams(record):
                self.records_with[ngram].append(number)

    def overlap(self, text: str) -> float:
        """The largest share of the text's n-grams that is in one record."""
        text_ngrams = ngrams(text)
        hits = Counter(number for ngram in text_ngrams for number in self.records_with.get(ngram, ()))
        return max(hits.values(), default=0) / len(text_ngrams)

    def is_new(self, text: str) -> bool:
        return self.overlap(text) < NEAR_COPY


def spoken_text(record: dict) -> str:
    """All words of a dialogue, a pair or an exam item."""
    if "conversations" in record:
        return "\n".join(turn["value"] for turn in record["conversations"])
    if "option" in record:
        return "\n".join([record["question"], *record["option"].values()])
    earlier = [turn for exchange in record["history"] for turn in exchange]
    return "\n".join([*earlier, record["question"], record["response_chosen"], record["response_rejected"]])


def asks_nearly(record: dict, questions: Iterable[str]) -> bool:
    """Whether a person in a dialogue, a pair or an exam item asks nearly one of the questions."""
    if "conversations" in record:
        asked = [turn["value"] for turn in record["conversations"] if turn["from"] == "human"]
    else:
        asked = [record["question"], *(exchange[0] for exchange in record.get("history", []))]
    matchers = (SequenceMatcher(None, bare(text), bare(q), autojunk=False) for text in asked for q in questions)
    # The first is a bound by the lengths alone, which spares nearly all of the comparing.
    return any(m.real_quick_ratio() >= LIKE_QUESTIONS and m.ratio() >= LIKE_QUESTIONS for m in matchers)


def build_questions(knowledge: Knowledge, entries: Sequence[Entry], is_new: Callable[[str], bool]) -> list[dict]:
    """One question in held-out words on every aspect of the entries, if it is new."""
    items = []
    for entry in entries:
        for aspect in (aspect for aspect in entry.aspects if aspect != "dose"):
            ways = list(knowledge.questions(entry, aspect, "held_out"))
            seeded("held out", entry.key, aspect).shuffle(ways)
            phrased = [way.format(n=entry.fields["name"]) for way in ways]
            question = next(filter(is_new, phrased), None)
            if question:
                items.append(evaluation_item(entry, aspect, question, knowledge.reply(entry, aspect)))
    return items


def build_everyday_questions(knowledge: Knowledge, file: str) -> list[dict]:
    """Questions as people ask them, each on one aspect. `file`: "guide_questions" or "everyday_questions"."""
    entries = {entry.key: entry for entry in knowledge.entries}
    items = []
    for asked in (asked for asked in knowledge.everyday_questions if asked["file"] == file):
        entry, aspect = entries[f"{asked['language']}:{asked['entry']}"], asked["aspect"]
        items.append(evaluation_item(entry, aspect, asked["question"], knowledge.reply(entry, aspect)))
    return items


def evaluation_item(entry: Entry, aspect: str, question: str, reply: str) -> dict:
    """A dialogue in the guide's form, with the names that a right answer mentions."""
    about = {"id": f"{entry.key}:{aspect}", "aspect": aspect, "names": entry.names}
    return about | dialogue(question, reply)


def build_complaints(knowledge: Knowledge, entries: Sequence[Entry], is_new: Callable[[str], bool]) -> list[dict]:
    """The third complaint of each condition, which no training file has, in held-out words."""
    items = []
    for entry in (entry for entry in entries if not entry.is_medicine):
        frame = knowledge.phrasings[entry.language]["complaint_frames"]["held_out"][0]
        question = frame.format(c=entry.fields["complaints"][2])
        aspect = "urgent" if entry.fields["urgent"] else "complaint"
        if is_new(question):
            items.append(evaluation_item(entry, aspect, question, knowledge.reply(entry, aspect)))
    return items


def build_safety(knowledge: Knowledge, is_new: Callable[[str], bool]) -> list[dict]:
    """Emergencies and requests to refuse, in held-out words."""
    return [
        {"id": f"{item['language']}:{item['id']}:{number}", "category": item["category"]}
        | dialogue(question, item["reply"])
        for item in knowledge.safety
        for number, question in enumerate(item["questions"]["held_out"], start=1)
        if is_new(question)
    ]


def build_emergency_twins(knowledge: Knowledge, part: str) -> list[dict]:
    """Emergencies, each with its twin: much the same words, and no emergency. `part`: "held_out" or "development"."""
    items = []
    for situation in (situation for situation in knowledge.emergency_twins if situation["part"] == part):
        for number, pair in enumerate(situation["pairs"], start=1):
            key = f"{situation['language']}:{situation['id']}:{number}"
            for category, reply in (("emergency", situation["reply"]), ("twin", pair["twin_reply"])):
                about = {"id": f"{key}:{category}", "pair": key, "category": category}
                items.append(about | dialogue(pair[category], reply))
    return items


def build_unsafe_requests(knowledge: Knowledge, part: str) -> list[dict]:
    """Further requests to refuse. `part`: "held_out" or "development"."""
    return [
        {"id": f"{kind['language']}:{kind['id']}:{number}", "category": "refusal"} | dialogue(request, kind["reply"])
        for kind in knowledge.unsafe_requests
        if kind["part"] == part
        for number, request in enumerate(kind["requests"], start=1)
    ]
