"""Exam questions with one right letter: those of the evaluation, and others to train on."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations

from medtune.reading.exams import Exam
from medtune.sample_data.evaluation import NEAR_COPY, ngrams, spoken_text
from medtune.sample_data.knowledge import Entry, Knowledge, seeded

LETTERS = "ABCDE"
N_EXAM_ITEMS = 300
# How training asks, in other words than the evaluation.
BY_COMPLAINT = (
    "一位患者说：“{}。”他最可能得了什么病？",
    "门诊病人自述：{}。应想到的疾病是：",
    "“{}。”这种情况多半是哪种病引起的？",
)
FOR_DEPARTMENT = (
    "一位患者说：“{}。”请问挂号该选什么科？",
    "门诊病人自述：{}。应由哪个科接诊？",
    "“{}。”这种情况看哪个科最合适？",
)
BY_SIGNS = ("病人{}，诊断多半是：", "病历上写着：{}。符合哪种病？", "下列哪种病多有这样的表现：{}？")
# Of the items in dialogues: asked for the letter at once; the others with a thought before it.
SHARE_WITHOUT_THOUGHT = 1 / 3
N_COMBINATIONS_OF_SIGNS = 3  # of each condition, in dialogues
N_SPOKEN = 5  # of each condition's further complaints, in dialogues

Item = tuple[str, str, list[str]]  # question, right option, wrong ones


def build_exam(knowledge: Knowledge, unseen: set[str], is_new: Callable[[str], bool]) -> list[dict]:
    """Multiple choice in CMB's form: find the condition by a new complaint, by its signs, or the right department."""
    entries = conditions(knowledge, unseen)
    makers = (ask_by_complaint, ask_by_signs, ask_for_department)
    items: list[dict] = []
    for maker in makers:
        order = seeded("exam", maker.__name__).sample(entries, len(entries))
        n_before = len(items)
        for entry in order:
            if len(items) - n_before == N_EXAM_ITEMS // len(makers):
                break
            rng = seeded("exam", maker.__name__, entry.key)
            asked = maker(entry, entries, rng)
            if len(asked[2]) < len(LETTERS) - 1:
                continue
            item = exam_item(entry, maker.__name__, asked, len(items), rng)
            if is_new(item["question"]) and is_new(spoken_text(item)):
                items.append(item)
    assert len(items) == N_EXAM_ITEMS, f"{len(items)} exam items"
    return items


def build_learned_exam(knowledge: Knowledge, unseen: set[str], evaluation: Sequence[dict]) -> list[dict]:
    """Items to train on: the complaints that dialogues have, and signs that no evaluation item has, in other words."""
    items = draw_new_items(knowledge, unseen, evaluation, "learned exam", learned_questions)
    seeded("learned exam").shuffle(items)
    return items


def build_exam_exchanges(
    knowledge: Knowledge, unseen: set[str], evaluation: Sequence[dict]
) -> Iterator[tuple[str, str]]:
    """Items as questions and replies of dialogues: a part answered by the letter alone, the others after a thought."""
    names = {entry.key: entry.fields["name"] for entry in knowledge.entries}
    for number, item in enumerate(draw_new_items(knowledge, unseen, evaluation, "exam dialogue", spoken_questions)):
        exam = Exam(item["question"], item["option"], item["answer"], {})
        if seeded("thought", number).random() < SHARE_WITHOUT_THOUGHT:
            yield exam.prompt("letter"), exam.reply("letter")
        else:
            thought = think(names[item["id"].rpartition(":")[0]], item)
            yield exam.prompt("tagged"), f"<think>\n{thought}\n</think>\n\n{exam.reply('tagged')}"


def think(name: str, item: dict) -> str:
    """A short thought: the condition, the department where that is asked for, and the options up to the right one."""
    right = item["option"][item["answer"]]
    steps = [f"这像是{name}" + (f"，该看{right}。" if right != name else "。")]
    for letter, option in item["option"].items():
        steps.append(f"{letter}是{option}，{'对' if letter == item['answer'] else '不是'}。")
        if letter == item["answer"]:
            break
    return "".join(steps)


def draw_new_items(
    knowledge: Knowledge,
    unseen: set[str],
    evaluation: Sequence[dict],
    seed: str,
    questions: Callable[..., Iterator[tuple[str, Item]]],
) -> list[dict]:
    """Items on every condition from `questions`, without those that nearly hold an item of the evaluation."""
    entries = conditions(knowledge, unseen)
    spoken = "\n".join(map(spoken_text, evaluation))
    held_out = [ngrams(text) for item in evaluation for text in (item["question"], spoken_text(item))]
    items: list[dict] = []
    for entry in entries:
        rng = seeded(seed, entry.key)
        for kind, asked in questions(entry, entries, spoken, rng):
            if len(asked[2]) < len(LETTERS) - 1:
                continue
            item = exam_item(entry, kind, asked, len(items), rng)
            own = ngrams(spoken_text(item))
            if all(len(own & theirs) < NEAR_COPY * len(theirs) for theirs in held_out):
                items.append(item)
    return items


def conditions(knowledge: Knowledge, unseen: set[str]) -> list[Entry]:
    return [
        entry
        for entry in knowledge.entries
        if entry.language == "zh" and not entry.is_medicine and entry.fields["id"] not in unseen
    ]


def exam_item(entry: Entry, kind: str, asked: Item, number: int, rng: random.Random) -> dict:
    """A record with four of the wrong options; the numbers of items take the letters in turn."""
    question, right, wrong = asked
    letter = LETTERS[number % len(LETTERS)]
    options = rng.sample(wrong, len(LETTERS) - 1)
    options.insert(LETTERS.index(letter), right)
    return {
        "id": f"{entry.key}:{kind.removeprefix('ask_').replace('_', ' ')}",
        "exam_subject": entry.fields["field"],
        "question_type": "单项选择题",
        "question": question,
        "option": dict(zip(LETTERS, options, strict=True)),
        "answer": letter,
    }


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


def ask_by_complaint(entry: Entry, entries: Sequence[Entry], rng: random.Random) -> Item:
    question = f"有人来询问：“{entry.fields['complaints'][2]}。”首先要考虑下列哪一种疾病？"
    return question, entry.fields["name"], names_of_other_fields(entry, entries)


def ask_by_signs(entry: Entry, entries: Sequence[Entry], rng: random.Random) -> Item:
    signs = rng.sample(entry.fields["symptoms"], 2)
    cause = rng.choice(entry.fields["causes"])
    question = f"表现有：{signs[0]}；{signs[1]}。可能的原因：{cause}。最可能的诊断是哪一项？"
    return question, entry.fields["name"], names_of_other_fields(entry, entries)


def ask_for_department(entry: Entry, entries: Sequence[Entry], rng: random.Random) -> Item:
    others = (other.fields["department"] for other in entries if other.fields["field"] != entry.fields["field"])
    right = entry.fields["department"]
    wrong = [name for name in of_like_length(right, others) if not set(name) & set(right) - set("科内外急诊医学门")]
    return f"有人来询问：“{entry.fields['complaints'][2]}。”到医院应当先去哪个科室？", right, wrong


def learned_questions(
    entry: Entry, entries: Sequence[Entry], held_out: str, rng: random.Random
) -> Iterator[tuple[str, Item]]:
    """Kind and question of the items to train on; no signs that stand in the evaluation's text `held_out`."""
    for complaint in [*entry.fields["complaints"][:2], *entry.more_complaints[N_SPOKEN:]]:
        named = entry.fields["name"], names_of_other_fields(entry, entries)
        yield "by complaint", (rng.choice(BY_COMPLAINT).format(complaint), *named)
        department = ask_for_department(entry, entries, rng)[1:]
        yield "for department", (rng.choice(FOR_DEPARTMENT).format(complaint), *department)
    signs = [sign for sign in entry.fields["symptoms"] if sign not in held_out]
    for first, second in zip(signs[::2], signs[1::2], strict=False):
        question = rng.choice(BY_SIGNS).format(f"{first}，{second}")
        yield "by signs", (question, entry.fields["name"], names_of_other_fields(entry, entries))


def spoken_questions(
    entry: Entry, entries: Sequence[Entry], held_out: str, rng: random.Random
) -> Iterator[tuple[str, Item]]:
    """The same for dialogues: of the complaints a part, so that the others are left to GRPO, and more signs."""
    complaint = entry.fields["complaints"][0]
    named = entry.fields["name"], names_of_other_fields(entry, entries)
    for way in rng.sample(BY_COMPLAINT, 2):
        yield "by complaint", (way.format(complaint), *named)
    for further in entry.more_complaints[:N_SPOKEN]:
        yield "by complaint", (rng.choice(BY_COMPLAINT).format(further), *named)
    department = ask_for_department(entry, entries, rng)[1:]
    yield "for department", (rng.choice(FOR_DEPARTMENT).format(complaint), *department)
    pairs = list(combinations([sign for sign in entry.fields["symptoms"] if sign not in held_out], 2))
    for first, second in rng.sample(pairs, min(N_COMBINATIONS_OF_SIGNS, len(pairs))):
        yield "by signs", (rng.choice(BY_SIGNS).format(f"{first}，{second}"), *named)
