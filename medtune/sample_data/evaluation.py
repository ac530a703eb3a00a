"""Questions, safety items and an exam that no training record nearly holds."""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

from medtune.sample_data.knowledge import Entry, Knowledge, seeded
from medtune.sample_data.learned import dialogue

N_EXAM_ITEMS = 300
LETTERS = "ABCDE"

# An item is a near copy when one training record holds this share of its runs of eight characters.
NGRAM = 8
NEAR_COPY = 0.5


def ngrams(text: str) -> set[str]:
    """The runs of eight letters or digits of a text, without blanks, punctuation and case."""
    text = re.sub(r"[\W_]+", "", text.lower())
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


def build_exam(knowledge: Knowledge, unseen: set[str], is_new: Callable[[str], bool]) -> list[dict]:
    """Multiple choice in CMB's form: find the condition by a new complaint, by its signs, or the right department."""
    entries = [
        entry
        for entry in knowledge.entries
        if entry.language == "zh" and not entry.is_medicine and entry.fields["id"] not in unseen
    ]
    makers = (ask_by_complaint, ask_by_signs, ask_for_department)
    items: list[dict] = []
    for maker in makers:
        order = seeded("exam", maker.__name__).sample(entries, len(entries))
        n_before = len(items)
        for entry in order:
            if len(items) - n_before == N_EXAM_ITEMS // len(makers):
                break
            rng = seeded("exam", maker.__name__, entry.key)
            question, right, wrong = maker(entry, entries, rng)
            if len(wrong) < len(LETTERS) - 1:
                continue
            letter = LETTERS[len(items) % len(LETTERS)]
            options = rng.sample(wrong, len(LETTERS) - 1)
            options.insert(LETTERS.index(letter), right)
            item = {
                "id": f"{entry.key}:{maker.__name__.removeprefix('ask_').replace('_', ' ')}",
                "exam_subject": entry.fields["field"],
                "question_type": "单项选择题",
                "question": question,
                "option": dict(zip(LETTERS, options, strict=True)),
                "answer": letter,
            }
            if is_new(question) and is_new(spoken_text(item)):
                items.append(item)
    assert len(items) == N_EXAM_ITEMS, f"{len(items)} exam items"
    return items


# What nearly every complaint may come from or be brought to, so that as wrong options they would be right.
ANYBODYS = {
    "普通感冒", "流行性感冒", "新型冠状病毒感染", "急诊科", "急诊外科", "全科医学科", "感染科", "发热门诊", "肠道门诊",
    "儿科", "儿科急诊", "普外科", "肾内科", "血液科", "呼吸内科", "神经内科",
}  # fmt: skip


def of_like_length(right: str, candidates: Iterable[str]) -> list[str]:
    """Wrong options that differ from the right one by a third of its length or two characters at most."""
    wrong = set(candidates) - ANYBODYS - {right}
    return sorted(option for option in wrong if abs(len(option) - len(right)) <= max(2, len(right) // 3))


def names_of_other_fields(entry: Entry, entries: Sequence[Entry]) -> list[str]:
    """Names of conditions of other parts of medicine, which the same signs would hardly suggest."""
    others = (other.fields["name"] for other in entries if other.fields["field"] != entry.fields["field"])
    return of_like_length(entry.fields["name"], others)


def ask_by_complaint(entry: Entry, entries: Sequence[Entry], rng: random.Random) -> tuple[str, str, list[str]]:
    question = f"有人来询问：“{entry.fields['complaints'][2]}。”首先要考虑下列哪一种疾病？"
    return question, entry.fields["name"], names_of_other_fields(entry, entries)


def ask_by_signs(entry: Entry, entries: Sequence[Entry], rng: random.Random) -> tuple[str, str, list[str]]:
    signs = rng.sample(entry.fields["symptoms"], 2)
    cause = rng.choice(entry.fields["causes"])
    question = f"表现有：{signs[0]}；{signs[1]}。可能的原因：{cause}。最可能的诊断是哪一项？"
    return question, entry.fields["name"], names_of_other_fields(entry, entries)


def ask_for_department(entry: Entry, entries: Sequence[Entry], rng: random.Random) -> tuple[str, str, list[str]]:
    others = (other.fields["department"] for other in entries if other.fields["field"] != entry.fields["field"])
    right = entry.fields["department"]
    wrong = [name for name in of_like_length(right, others) if not set(name) & set(right) - set("科内外急诊医学门")]
    return f"有人来询问：“{entry.fields['complaints'][2]}。”到医院应当先去哪个科室？", right, wrong
