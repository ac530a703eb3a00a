"""Write the sample data of every stage from the knowledge base, the same bytes on every run.

`data/knowledge/` holds what people wrote: conditions and medicines, ways to ask and to answer, situations in which
to refuse or to send the person to hospital, and hand-written dialogues. From it come `data/pretrain`,
`data/finetune`, `data/reward` and `data/eval`. Ways to ask and conditions that the evaluation holds out never enter
the training files, and no evaluation item shares most of its text with one training record.

    python scripts/build_sample_data.py            # write the files
    python scripts/build_sample_data.py --check    # say whether they are what would be written
"""

import argparse
import json
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from medtune.errors import UserError, run_script

SEED = 20240601
SAMPLE_SIZE = 1000  # of medical_sft_1K_format.jsonl
N_PAIRS = 4000
N_SITUATION_PAIRS = 600  # more, only about emergencies and requests to refuse
N_SAMPLE_PAIRS = 500  # of dpo_zh_500.jsonl
N_EVAL_PAIRS = 300
N_EVAL_QUESTIONS = 500
N_EXAM_ITEMS = 300
N_UNSEEN_CONDITIONS = 15

# Of the training pairs that are dangerous or ignore a red flag: about situations, not conditions.
SHARE_OF_SITUATIONS = 0.5
# Of the rejected replies to them, before those of a wrong length are thrown away: sound answers to another question,
# as an untaught model gives.
SHARE_OFF_THE_POINT = 0.5

LETTERS = "ABCDE"

# The wordings of a reply in phrasings.json: of dialogues and pairs; of held-out pairs; of pairs alone.
TRAINED, HELD_OUT, REWORDED = 0, 1, (2, 3)
# Of the training pairs that need a look at the reply's own course: in sentences that fine-tuning did not teach, for
# in the others a model knows the sentences and need not see the fault.
SHARE_OF_REWORDED = 0.6

# An item is a near copy when one training record holds this share of its runs of eight characters.
NGRAM = 8
NEAR_COPY = 0.5

CONDITION_ASPECTS = (
    "overview", "causes", "symptoms", "examinations", "treatment", "medicines", "diet_and_care", "prevention",
    "red_flags", "department", "advice",
)  # fmt: skip
MEDICINE_ASPECTS = (
    "overview", "uses", "how_to_take", "side_effects", "not_for", "interactions", "diet_and_care", "red_flags",
    "overdose", "dose",
)  # fmt: skip
# What is told otherwise of a condition whose complaints call for an ambulance.
URGENT_FRAMES = {"urgent_advice", "urgent_department", "urgent_examinations", "urgent_red_flag"}
# Steps, and signs of which the first weigh most.
IN_ORDER = {"treatment", "first_aid", "how_to_take", "red_flags"}
IMPERATIVES = {"diet_and_care", "prevention", "first_aid", "how_to_take"}

# ---------------------------------------------------------------- the knowledge base


class Clauses(list):
    """Clauses of an entry, which format as one enumeration and index as a list."""

    def __init__(self, clauses: Iterable[str], joined: str):
        super().__init__(clauses)
        self.joined = joined

    def __format__(self, spec: str) -> str:
        return self.joined


@dataclass(frozen=True)
class Entry:
    """A condition or a medicine in one language: its fields as they stand in conditions.jsonl."""

    fields: dict

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
    bad_replies: dict
    dialogues: list[dict]

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
            value = Clauses(value, _joined(value, name, entry.language))
        values[name] = value
    return values


def _joined(clauses: Sequence[str], field: str, language: str) -> str:
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
    return Knowledge(
        entries=[Entry(record) for record in read_lines(folder / "conditions.jsonl")],
        phrasings=json.loads((folder / "phrasings.json").read_text(encoding="utf-8")),
        safety=read_lines(folder / "safety.jsonl"),
        bad_replies=json.loads((folder / "bad_replies.json").read_text(encoding="utf-8")),
        dialogues=read_lines(folder / "dialogues.jsonl"),
    )


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def seeded(*what: object) -> random.Random:
    """A source of chance of its own for each thing made, so that new entries leave the others as they are."""
    return random.Random(":".join(map(str, (SEED, *what))))


def choose_unseen(knowledge: Knowledge) -> set[str]:
    """The ids of the conditions that only the pretraining text knows: no other entry or dialogue mentions them."""
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


# ---------------------------------------------------------------- pretraining text


def build_documents(knowledge: Knowledge) -> list[str]:
    """Four documents an entry: three that tell all of it, one in other words."""
    documents = []
    for entry in knowledge.entries:
        rng, text = seeded("document", entry.key), partial(knowledge.reply, entry)
        phrasings = knowledge.phrasings[entry.language]["documents"]
        titles = [title.format(name=entry.fields["name"]) for title in phrasings["titles"]]
        aliases = _joined(entry.fields["aliases"], "aliases", entry.language)
        also = [phrasings["also"].format(name=entry.fields["name"], aliases=aliases)] if aliases else []
        if entry.is_medicine:
            parts = [
                [text("overview"), *also, text("uses"), text("how_to_take")],
                [text("side_effects"), text("not_for"), text("interactions")],
                [text("diet_and_care"), text("red_flags"), text("overdose")],
                [text(aspect, HELD_OUT, rng) for aspect in ("uses", "side_effects", "not_for", "interactions")],
            ]
        else:
            parts = [
                [text("overview"), *also, text("causes"), text("symptoms")],
                [text("examinations"), text("treatment"), text("medicines")],
                [text("diet_and_care"), text("prevention"), text("red_flags")],
                [
                    text(aspect, HELD_OUT, rng)
                    for aspect in ("symptoms", "causes", "examinations", "prevention", "red_flags")
                ],
            ]
        space = "" if entry.language == "zh" else " "
        documents += [space.join([rng.choice(titles), *sentences]) for sentences in parts]
    seeded("documents").shuffle(documents)
    return documents


# ---------------------------------------------------------------- dialogues


def dialogue(*turns: str, system: str = "") -> dict:
    """The guide's form of a dialogue, from alternating turns that begin with the person's."""
    said = [{"from": "system", "value": system}] if system else []
    said += [{"from": ("human", "gpt")[index % 2], "value": turn} for index, turn in enumerate(turns)]
    return {"conversations": said}


def lower_first(text: str) -> str:
    """An English clause inside a sentence; "I ..." stays."""
    return text if text.startswith(("I ", "I'")) else text[:1].lower() + text[1:]


def build_dialogues(knowledge: Knowledge, unseen: set[str]) -> list[dict]:
    """All dialogues to learn: single questions, talks, questions back, emergencies, refusals."""
    made: list[list[str]] = []
    for entry in (entry for entry in knowledge.entries if entry.fields["id"] not in unseen):
        made += ask_each_aspect(knowledge, entry)
        made += talk_on(knowledge, entry)
        if not entry.is_medicine:
            made += complain(knowledge, entry)
    for situation in knowledge.safety:
        made += [[question, situation["reply"]] for question in situation["questions"]["train"]]

    dialogues, first_turns = [], set()
    for turns in made:
        if turns[0] not in first_turns:
            first_turns.add(turns[0])
            rng = seeded("system", turns[0])
            language = "zh" if re.search("[\u4e00-\u9fff]", turns[0]) else "en"
            prompts = knowledge.phrasings[language]["system_prompts"]["train"]
            dialogues.append(dialogue(*turns, system=rng.choice(prompts) if rng.random() < 0.2 else ""))
    dialogues += [d for d in knowledge.dialogues if first_question(d) not in first_turns]
    seeded("dialogues").shuffle(dialogues)
    return dialogues


def first_question(record: dict) -> str:
    return next(turn["value"] for turn in record["conversations"] if turn["from"] == "human")


def ask_each_aspect(knowledge: Knowledge, entry: Entry) -> Iterator[list[str]]:
    """Two ways to ask about each aspect, once by the name and once by any of its names."""
    for aspect in entry.aspects:
        rng = seeded("aspect", entry.key, aspect)
        ways = rng.sample(knowledge.questions(entry, aspect, "train"), 2)
        for way, name in zip(ways, (entry.fields["name"], rng.choice(entry.names)), strict=True):
            yield [way.format(n=name), knowledge.reply(entry, aspect)]


def talk_on(knowledge: Knowledge, entry: Entry) -> Iterator[list[str]]:
    """One talk in which the later questions name nothing."""
    rng = seeded("talk", entry.key)
    follow_ups = knowledge.phrasings[entry.language]["follow_ups"]
    first = rng.choice(["overview", "symptoms", "advice"] if not entry.is_medicine else ["overview", "uses"])
    later = rng.sample([a for a in entry.aspects if a in follow_ups and a != first], rng.choice([1, 2]))
    turns = [rng.choice(knowledge.questions(entry, first, "train")).format(n=rng.choice(entry.names))]
    turns.append(knowledge.reply(entry, first))
    for aspect in later:
        turns += [rng.choice(follow_ups[aspect]), knowledge.reply(entry, aspect)]
    yield turns


def complain(knowledge: Knowledge, entry: Entry) -> Iterator[list[str]]:
    """Complaints that do not name the condition (the third is held out), and its red flags."""
    rng = seeded("complaint", entry.key)
    phrasings, complaints = knowledge.phrasings[entry.language], entry.fields["complaints"][:2]
    frames = phrasings["complaint_frames"]["train"]
    reply = knowledge.reply(entry, "urgent" if entry.fields["urgent"] else "complaint")
    for complaint, frame in zip(complaints, rng.sample(frames, 2), strict=True):
        yield [frame.format(c=complaint), reply]
    if not entry.fields["urgent"]:
        stop = "。" if entry.language == "zh" else "."
        complaint = rng.choice(complaints).removesuffix(stop) + stop
        yield [complaint, knowledge.reply(entry, "ask_back"), knowledge.reply(entry, "tell"), reply]
    ways = rng.sample(phrasings["red_flag_frames"]["train"], 2)
    for way, flag in zip(ways, rng.sample(entry.fields["red_flags"], 2), strict=True):
        question = way.format(n=rng.choice(entry.names), r=flag)
        yield [question, knowledge.reply(entry, "red_flag", red_flag=flag)]


# ---------------------------------------------------------------- prompts of PPO


def build_prompts(knowledge: Knowledge, unseen: set[str], dialogues: Sequence[dict]) -> list[dict]:
    """Questions that the dialogues do not ask in these words: emergencies, requests to refuse, one on each entry."""
    asked = set(map(first_question, dialogues))
    prompts = [
        dialogue(question, situation["reply"])
        for situation in knowledge.safety
        for question in situation["questions"]["preference"]
    ]
    for entry in (entry for entry in knowledge.entries if entry.fields["id"] not in unseen):
        rng = seeded("prompts", entry.key)
        aspect = rng.choice(entry.aspects)
        ways = [way.format(n=entry.fields["name"]) for way in knowledge.questions(entry, aspect, "train")]
        question = rng.choice([way for way in ways if way not in asked])
        prompts.append(dialogue(question, knowledge.reply(entry, aspect)))
    seeded("prompts").shuffle(prompts)
    return prompts


# ---------------------------------------------------------------- preference pairs


@dataclass(frozen=True)
class Prompt:
    """A question with its right answer, about an entry (then `aspect` says what of it) or told as a situation."""

    language: str
    entry: Entry | None
    aspect: str
    question: str
    chosen: str
    wording: int  # of the right answer: TRAINED, HELD_OUT or one of REWORDED


def build_pairs(
    knowledge: Knowledge,
    entries: Sequence[Entry],
    n_pairs: int,
    part: str,
    prompts: dict[str, Callable[..., Prompt]],
    seed: str,
    usable: Callable[[dict], bool] = lambda pair: True,
) -> list[dict]:
    """Preference pairs: each failure as often, and its rejected answers longer in half of the cases.

    `part` is "train" or "held_out"; `prompts` has for each failure what makes a prompt for it; `seed` names the source
    of chance; `usable` takes a pair and says whether it may be used.
    """
    failures = tuple(prompts)
    pairs, seen, attempt = [], set(), 0
    while len(pairs) < n_pairs:
        failure = failures[len(pairs) % len(failures)]
        is_longer = len(pairs) // len(failures) % 2 == 0
        rng = seeded(seed, attempt)
        attempt += 1
        prompt = prompts[failure](knowledge, entries, part, rng)
        low, high = (1.08, 1.6) if is_longer else (0.6, 0.92)
        length = round(len(prompt.chosen) * rng.uniform(low, high))
        rejected = REJECTED[failure](knowledge, entries, prompt, length, rng)
        key = (prompt.question, rejected)
        fits = len(rejected) != len(prompt.chosen) and (len(rejected) > len(prompt.chosen)) == is_longer
        pair = as_pair(knowledge, prompt, rejected, part, rng)
        if fits and rejected.strip() and key not in seen and usable(pair):
            seen.add(key)
            pairs.append(pair | ({"failure": failure} if part == "held_out" else {}))
        assert attempt < 100 * n_pairs, f"no more {failure} pairs to be found"
    return pairs


def as_pair(knowledge: Knowledge, prompt: Prompt, rejected: str, part: str, rng: random.Random) -> dict:
    """The guide's form; some with a system prompt, some after an earlier exchange about the same entry."""
    system_prompts = knowledge.phrasings[prompt.language]["system_prompts"][part]
    system = rng.choice(system_prompts) if rng.random() < 0.2 else ""
    history = []
    if prompt.entry and prompt.aspect in prompt.entry.aspects and rng.random() < 0.1:
        earlier = rng.choice([aspect for aspect in prompt.entry.aspects if aspect != prompt.aspect])
        way = rng.choice(knowledge.questions(prompt.entry, earlier, part))
        history = [[way.format(n=prompt.entry.fields["name"]), knowledge.reply(prompt.entry, earlier)]]
    return {
        "system": system,
        "history": history,
        "question": prompt.question,
        "response_chosen": prompt.chosen,
        "response_rejected": rejected,
    }


def prompt_on_aspect(
    knowledge: Knowledge,
    entries: Sequence[Entry],
    part: str,
    rng: random.Random,
    aspects: Sequence[str] = (),
    share_of_reworded: float = 0.0,
) -> Prompt:
    """A question on an aspect; the held-out ones have their right answer in other words than training's."""
    entry = rng.choice([e for e in entries if not aspects or set(aspects) & set(e.aspects)])
    aspect = rng.choice([aspect for aspect in entry.aspects if not aspects or aspect in aspects])
    question = rng.choice(knowledge.questions(entry, aspect, part)).format(n=rng.choice(entry.names))
    wording = HELD_OUT if part == "held_out" else TRAINED
    if part == "train" and rng.random() < share_of_reworded:
        wording = rng.choice(REWORDED)
    return Prompt(entry.language, entry, aspect, question, reply_in(knowledge, entry, aspect, wording, rng), wording)


def reply_in(knowledge: Knowledge, entry: Entry, frame: str, wording: int, rng: random.Random, **values: str) -> str:
    """The answer of dialogues as it stands there, another wording in another order too."""
    return knowledge.reply(entry, frame, wording, None if wording == TRAINED else rng, **values)


def prompt_on_situation(
    knowledge: Knowledge, entries: Sequence[Entry], part: str, rng: random.Random, category: str
) -> Prompt:
    """An emergency or a request to refuse; their answers have one wording, so no held-out pair has them."""
    situation = rng.choice([situation for situation in knowledge.safety if situation["category"] == category])
    question = rng.choice(situation["questions"]["train"] + situation["questions"]["preference"])
    return Prompt(situation["language"], None, category, question, situation["reply"], TRAINED)


def prompt_on_care(knowledge: Knowledge, entries: Sequence[Entry], part: str, rng: random.Random) -> Prompt:
    """What to do about something, or a request that is to be refused."""
    if part == "train" and rng.random() < SHARE_OF_SITUATIONS:
        return prompt_on_situation(knowledge, entries, part, rng, "refusal")
    return prompt_on_aspect(knowledge, entries, part, rng, aspects=CARE)


def prompt_with_red_flag(knowledge: Knowledge, entries: Sequence[Entry], part: str, rng: random.Random) -> Prompt:
    """Somebody describes an emergency."""
    if part == "train" and rng.random() < SHARE_OF_SITUATIONS:
        return prompt_on_situation(knowledge, entries, part, rng, "emergency")
    wording = HELD_OUT if part == "held_out" else TRAINED
    entry = rng.choice([entry for entry in entries if not entry.is_medicine])
    phrasings = knowledge.phrasings[entry.language]
    if entry.fields["urgent"] and rng.random() < 0.7:
        complaints = entry.fields["complaints"]
        complaint = complaints[2] if part == "held_out" else rng.choice(complaints[:2])
        question = rng.choice(phrasings["complaint_frames"][part]).format(c=complaint)
        return Prompt(
            entry.language, entry, "urgent", question, reply_in(knowledge, entry, "urgent", wording, rng), wording
        )
    flag = rng.choice(entry.fields["red_flags"])
    question = rng.choice(phrasings["red_flag_frames"][part]).format(n=rng.choice(entry.names), r=flag)
    chosen = reply_in(knowledge, entry, "red_flag", wording, rng, red_flag=flag)
    return Prompt(entry.language, entry, "red_flag", question, chosen, wording)


CARE = ("treatment", "medicines", "diet_and_care", "prevention", "advice", "dose", "overdose", "how_to_take")
DOSED = ("medicines", "treatment", "dose", "how_to_take", "uses")
on_its_course = partial(prompt_on_aspect, share_of_reworded=SHARE_OF_REWORDED)
PROMPTS = {
    "vague": prompt_on_aspect,
    "wrong condition": on_its_course,
    "dangerous": prompt_on_care,
    "ignores a red flag": prompt_with_red_flag,
    "cut off": on_its_course,
    "repeats": on_its_course,
    "invents a dose": partial(prompt_on_aspect, aspects=DOSED),
}
SITUATION_PROMPTS = {
    "ignores a red flag": partial(prompt_on_situation, category="emergency"),
    "dangerous": partial(prompt_on_situation, category="refusal"),
}


def fill(sentences: Sequence[str], length: int, language: str, rng: random.Random) -> str:
    """Sentences in random order, as many as come closest to `length` characters."""
    space = "" if language == "zh" else " "
    text = ""
    for sentence in rng.sample(sentences, len(sentences)):
        longer = f"{text}{space if text else ''}{sentence}"
        if text and abs(len(longer) - length) > abs(len(text) - length):
            break
        text = longer
    return text


def reject_with(pool: str, knowledge: Knowledge, entries: Sequence[Entry], prompt: Prompt, length: int, rng) -> str:
    """Sentences that are bad in one way and true of nothing; for a situation also an answer off the point."""
    if not prompt.entry and rng.random() < SHARE_OFF_THE_POINT:
        return reject_off_the_point(knowledge, entries, prompt, length, rng)
    sentences = knowledge.bad_replies[prompt.language][pool]
    if prompt.entry and not prompt.entry.is_medicine:
        name = rng.choice(prompt.entry.names)
        sentences = [sentence.format(n=name) for sentence in sentences]
    else:  # the sentences with a name speak of an illness
        sentences = [sentence for sentence in sentences if "{n}" not in sentence]
    return fill(sentences, length, prompt.language, rng)


def reject_off_the_point(
    knowledge: Knowledge, entries: Sequence[Entry], prompt: Prompt, length: int, rng: random.Random
) -> str:
    """What fits an everyday question, said to somebody in an emergency or with a request to refuse."""
    calm = [e for e in entries if e.language == prompt.language and (e.is_medicine or not e.fields["urgent"])]
    answers = []
    for entry in rng.sample(calm, 12):
        aspects = ("overview", "causes", "diet_and_care", "ask_back")
        if entry.is_medicine:
            aspects = ("overview", "uses", "how_to_take")
        answers.append(knowledge.reply(entry, rng.choice(aspects)))
    return min(answers, key=lambda answer: abs(len(answer) - length))


def reject_wrong_condition(knowledge: Knowledge, entries: Sequence[Entry], prompt: Prompt, length: int, rng) -> str:
    """A sound answer to the same question about something else, its frame being the right answer's."""
    others = [
        entry
        for entry in entries
        if entry.language == prompt.entry.language
        and entry.is_medicine == prompt.entry.is_medicine
        and entry.fields["id"] != prompt.entry.fields["id"]
    ]
    answers = [
        reply_in(knowledge, entry, prompt.aspect, prompt.wording, rng)
        for entry in rng.sample(others, min(12, len(others)))
    ]
    return min(answers, key=lambda answer: abs(len(answer) - length))


def reject_cut_off(knowledge: Knowledge, entries: Sequence[Entry], prompt: Prompt, length: int, rng) -> str:
    """The answer, longer where there is need, that breaks off in the middle of a phrase."""
    more = [aspect for aspect in prompt.entry.aspects if aspect != prompt.aspect]
    space = "" if prompt.entry.language == "zh" else " "
    text = space.join([prompt.chosen, *(knowledge.reply(prompt.entry, a) for a in rng.sample(more, 2))])
    while length > 1 and not (text[length - 1].isalnum() and text[length].isalnum()):
        length -= 1
    return text[:length]


def reject_repetition(knowledge: Knowledge, entries: Sequence[Entry], prompt: Prompt, length: int, rng) -> str:
    """The beginning of the answer over and over."""
    pieces = re.findall(r"[^，。；：、！？,.;:!?]+[，。；：、！？,.;:!?]*\s*", prompt.chosen)
    unit = pieces[0]
    for piece in pieces[1:]:
        if len(unit) + len(piece) > length / 2:
            break
        unit += piece
    return (unit * max(2, round(length / len(unit)))).strip()


def reject_dose(knowledge: Knowledge, entries: Sequence[Entry], prompt: Prompt, length: int, rng) -> str:
    """Doses out of the air."""
    fields = prompt.entry.fields
    medicines = [fields["name"]] if prompt.entry.is_medicine else [m["name"] for m in fields["medicines"]]
    frames = knowledge.bad_replies[prompt.entry.language]["dose"]
    sentences = [
        frame.format(
            m=rng.choice(medicines), k=rng.randint(2, 9), t=rng.randint(2, 8), d=rng.randint(3, 30),
            mg=rng.choice((15, 35, 75, 120, 180, 250, 400, 750, 900)),
        )
        for frame in frames
    ]  # fmt: skip
    return fill(sentences, length, prompt.entry.language, rng)


REJECTED = {
    "vague": partial(reject_with, "vague"),
    "wrong condition": reject_wrong_condition,
    "dangerous": partial(reject_with, "dangerous"),
    "ignores a red flag": partial(reject_with, "reassuring"),
    "cut off": reject_cut_off,
    "repeats": reject_repetition,
    "invents a dose": reject_dose,
}

# ---------------------------------------------------------------- no leak


def ngrams(text: str) -> set[str]:
    """The runs of eight letters or digits of a text, without blanks, punctuation and case."""
    text = re.sub(r"[\W_]+", "", text.lower())
    return {text[start : start + NGRAM] for start in range(max(1, len(text) - NGRAM + 1))}


class TrainingText:
    """Tells how much of a text stands in one training record."""

    def __init__(self, records: Iterable[str]):
        self.records_with: dict[str, list[int]] = defaultdict(list)
        for number, record in enumerate(records):
            for ngram in ngrams(record):
                self.records_with[ngram].append(number)

    def overlap(self, text: str) -> float:
        """The largest share of the text's n-grams that one record holds."""
        wanted = ngrams(text)
        hits = Counter(number for ngram in wanted for number in self.records_with.get(ngram, ()))
        return max(hits.values(), default=0) / len(wanted)

    def is_new(self, text: str) -> bool:
        return self.overlap(text) < NEAR_COPY


def said(record: dict) -> str:
    """All words of a dialogue, a pair or an exam item."""
    if "conversations" in record:
        return "\n".join(turn["value"] for turn in record["conversations"])
    if "option" in record:
        return "\n".join([record["question"], *record["option"].values()])
    earlier = [turn for exchange in record["history"] for turn in exchange]
    return "\n".join([*earlier, record["question"], record["response_chosen"], record["response_rejected"]])


# ---------------------------------------------------------------- evaluation


def build_questions(knowledge: Knowledge, entries: Sequence[Entry], is_new: Callable[[str], bool]) -> list[dict]:
    """One question in held-out words on every aspect of the entries, where it is new."""
    made = []
    for entry in entries:
        for aspect in (aspect for aspect in entry.aspects if aspect != "dose"):
            ways = list(knowledge.questions(entry, aspect, "held_out"))
            seeded("held out", entry.key, aspect).shuffle(ways)
            asked = [way.format(n=entry.fields["name"]) for way in ways]
            question = next(filter(is_new, asked), None)
            if question:
                made.append(evaluation_item(entry, aspect, question, knowledge.reply(entry, aspect)))
    return made


def evaluation_item(entry: Entry, aspect: str, question: str, reply: str) -> dict:
    """A dialogue in the guide's form, with what a right answer names."""
    about = {"id": f"{entry.key}:{aspect}", "aspect": aspect, "names": entry.names}
    return about | dialogue(question, reply)


def build_complaints(knowledge: Knowledge, entries: Sequence[Entry], is_new: Callable[[str], bool]) -> list[dict]:
    """The third complaint of each condition, which no training file has, in held-out words."""
    made = []
    for entry in (entry for entry in entries if not entry.is_medicine):
        frame = knowledge.phrasings[entry.language]["complaint_frames"]["held_out"][0]
        question = frame.format(c=entry.fields["complaints"][2])
        aspect = "urgent" if entry.fields["urgent"] else "complaint"
        if is_new(question):
            made.append(evaluation_item(entry, aspect, question, knowledge.reply(entry, aspect)))
    return made


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
            if is_new(question) and is_new(said(item)):
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


# ---------------------------------------------------------------- files


def build(knowledge: Knowledge) -> dict[str, str]:
    """The text of every file, by its path below data/."""
    unseen = choose_unseen(knowledge)
    documents = build_documents(knowledge)
    dialogues = build_dialogues(knowledge, unseen)
    seen_entries = [entry for entry in knowledge.entries if entry.fields["id"] not in unseen]
    pairs = build_pairs(knowledge, seen_entries, N_PAIRS + N_SAMPLE_PAIRS, "train", PROMPTS, "pair:train")
    sample_pairs = [pair for pair in pairs if re.search("[\u4e00-\u9fff]", pair["question"])][:N_SAMPLE_PAIRS]
    pairs = [pair for pair in pairs if pair not in sample_pairs]
    pairs += build_pairs(knowledge, seen_entries, N_SITUATION_PAIRS, "train", SITUATION_PROMPTS, "situation pair")
    seeded("mix").shuffle(pairs)
    prompts = build_prompts(knowledge, unseen, dialogues)

    learned = TrainingText([*documents, *map(said, [*dialogues, *pairs, *sample_pairs, *prompts])])
    unseen_entries = [entry for entry in knowledge.entries if entry.fields["id"] in unseen]
    questions = build_questions(knowledge, seen_entries, learned.is_new)
    seeded("questions").shuffle(questions)
    replies = {pair[key] for pair in [*pairs, *sample_pairs] for key in ("response_chosen", "response_rejected")}

    def is_new_pair(pair: dict) -> bool:
        is_repeated = replies & {pair["response_chosen"], pair["response_rejected"]}
        without_history = said(pair | {"history": []})
        return not is_repeated and learned.is_new(pair["question"]) and learned.is_new(without_history)

    eval_pairs = build_pairs(knowledge, seen_entries, N_EVAL_PAIRS, "held_out", PROMPTS, "pair:held_out", is_new_pair)
    records = {
        "finetune/train.jsonl": dialogues[SAMPLE_SIZE:],
        "finetune/medical_sft_1K_format.jsonl": dialogues[:SAMPLE_SIZE],
        "reward/train.jsonl": pairs,
        "reward/dpo_zh_500.jsonl": sample_pairs,
        "ppo/prompts.jsonl": prompts,
        "eval/questions.jsonl": questions[:N_EVAL_QUESTIONS],
        "eval/unseen_conditions.jsonl": build_questions(knowledge, unseen_entries, learned.is_new),
        "eval/complaints.jsonl": build_complaints(knowledge, seen_entries, learned.is_new),
        "eval/safety.jsonl": build_safety(knowledge, learned.is_new),
        "eval/preference_pairs.jsonl": eval_pairs,
        "eval/exam.jsonl": build_exam(knowledge, unseen, learned.is_new),
    }
    files = {"pretrain/medical_corpus.txt": "".join(f"{document}\n" for document in documents)}
    for name, lines in records.items():
        files[name] = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return files


def main(argv: list[str] | None = None) -> None:
    """Write the files, or compare them with what would be written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="holds knowledge/; the files go beside it")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file differs")
    args = parser.parse_args(argv)

    files = build(read_knowledge(args.data_dir / "knowledge"))
    if args.check:
        stale = [name for name, text in files.items() if not holds(args.data_dir / name, text)]
        if stale:
            raise UserError(
                f"{', '.join(str(args.data_dir / name) for name in stale)}: not what data/knowledge gives; "
                "run `python scripts/build_sample_data.py`"
            )
        print(f"{args.data_dir}: all {len(files)} files are what data/knowledge gives")
        return
    for name, text in files.items():
        path = args.data_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
        print(f"{path}: {text.count(chr(10)):,} lines")


def holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode()


if __name__ == "__main__":
    run_script(main)
