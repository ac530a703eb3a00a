"""Preference pairs: a right reply, and one with a named failure."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from medtune.sample_data.knowledge import HELD_OUT, REWORDED, TRAINED, Entry, Knowledge, seeded
from medtune.sample_data.learned import in_a_frame

# Of the training pairs that are dangerous or ignore a red flag: about situations, not conditions.
SHARE_OF_SITUATIONS = 0.5
# Of the rejected replies to them, before those of a wrong length are thrown away: sound answers to another question,
# as an untaught model gives.
SHARE_OFF_THE_POINT = 0.5
# Of the rejected replies to a question with a twin, before the same: the right reply to the twin.
SHARE_FOR_THE_TWIN = 0.4
# Of the questions with twins in training pairs: behind a greeting, or with a question added.
SHARE_IN_A_FRAME = 0.4
CRISIS_LINES = ("12356", "crisis line")
# Of the questions that a misplaced alarm or refusal is the answer to: twins, and of the others complaints.
SHARE_OF_TWINS = 0.5
SHARE_OF_COMPLAINTS = 0.5
# Of the training pairs that need a look at the reply's own course: in sentences that fine-tuning did not teach, for
# in the others a model knows the sentences and need not see the fault.
SHARE_OF_REWORDED = 0.6


@dataclass(frozen=True)
class PairPrompt:
    """A question with its right answer, about an `aspect` of an entry or as a described situation."""

    language: str
    entry: Entry | None
    aspect: str
    question: str
    chosen: str
    wording: int  # of the right answer: TRAINED, HELD_OUT or one of REWORDED
    reply_to_twin: str = ""  # to a question in much the same words that asks for something else


def build_pairs(
    knowledge: Knowledge,
    entries: Sequence[Entry],
    n_pairs: int,
    part: str,
    prompts: dict[str, Callable[..., PairPrompt]],
    seed: str,
    usable: Callable[[dict], bool] = lambda pair: True,
) -> list[dict]:
    """Preference pairs with each failure equally often; half of the rejected answers are the longer ones.

    `part` is "train" or "held_out"; `prompts` has a function for each failure that makes a prompt; `seed` names the
        random generator; `usable` takes a pair and returns whether to use it.
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


def as_pair(knowledge: Knowledge, prompt: PairPrompt, rejected: str, part: str, rng: random.Random) -> dict:
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
) -> PairPrompt:
    """A question on an aspect; the right answers of held-out ones are in other words than in training."""
    entry = rng.choice([e for e in entries if not aspects or set(aspects) & set(e.aspects)])
    aspect = rng.choice([aspect for aspect in entry.aspects if not aspects or aspect in aspects])
    question = rng.choice(knowledge.questions(entry, aspect, part)).format(n=rng.choice(entry.names))
    wording = HELD_OUT if part == "held_out" else TRAINED
    if part == "train" and rng.random() < share_of_reworded:
        wording = rng.choice(REWORDED)
    return PairPrompt(
        entry.language, entry, aspect, question, reply_in(knowledge, entry, aspect, wording, rng), wording
    )


def reply_in(knowledge: Knowledge, entry: Entry, frame: str, wording: int, rng: random.Random, **values: str) -> str:
    """The answer of dialogues as it stands there, another wording in another order too."""
    return knowledge.reply(entry, frame, wording, None if wording == TRAINED else rng, **values)


def prompt_on_situation(
    knowledge: Knowledge, entries: Sequence[Entry], part: str, rng: random.Random, category: str
) -> PairPrompt:
    """An emergency or a request to refuse, for training only: their answers have a single wording."""
    situation = rng.choice([situation for situation in knowledge.safety if situation["category"] == category])
    question = rng.choice(situation["questions"]["train"] + situation["questions"]["preference"])
    return PairPrompt(situation["language"], None, category, question, situation["reply"], TRAINED)


def prompt_on_twins(
    knowledge: Knowledge, entries: Sequence[Entry], part: str, rng: random.Random, category: str, is_twin: bool
) -> PairPrompt:
    """An emergency or a request to refuse (`category`), or the harmless twin of one, for training only."""
    situation = rng.choice([situation for situation in knowledge.safety_twins if situation["category"] == category])
    asked = rng.choice([asked for asked in situation["questions"] if "twin" in asked or not is_twin])
    exchange = asked["question"], situation["reply"]
    twin = asked.get("twin", ""), asked.get("twin_reply", "")
    (question, chosen), (_, other) = (twin, exchange) if is_twin else (exchange, twin)
    if rng.random() < SHARE_IN_A_FRAME:
        question = in_a_frame(knowledge, question, category == "emergency" and not is_twin, rng)
    return PairPrompt(situation["language"], None, category, question, chosen, TRAINED, other)


def prompt_without_alarm(
    knowledge: Knowledge, entries: Sequence[Entry], part: str, rng: random.Random, category: str
) -> PairPrompt:
    """What calls for an ordinary answer: a harmless twin, a complaint that can wait, or a question on an aspect."""
    if rng.random() < SHARE_OF_TWINS:
        return prompt_on_twins(knowledge, entries, part, rng, category, is_twin=True)
    if category == "emergency" and rng.random() < SHARE_OF_COMPLAINTS:
        entry = rng.choice([entry for entry in entries if not entry.is_medicine and not entry.fields["urgent"]])
        frame = rng.choice(knowledge.phrasings[entry.language]["complaint_frames"][part])
        question = frame.format(c=rng.choice(entry.fields["complaints"][:2]))
        return PairPrompt(
            entry.language, entry, "complaint", question, reply_in(knowledge, entry, "complaint", TRAINED, rng), TRAINED
        )
    return prompt_on_aspect(knowledge, entries, part, rng)


def prompt_on_care(knowledge: Knowledge, entries: Sequence[Entry], part: str, rng: random.Random) -> PairPrompt:
    """What to do about something, or a request that is to be refused."""
    if part == "train" and rng.random() < SHARE_OF_SITUATIONS:
        return prompt_on_situation(knowledge, entries, part, rng, "refusal")
    return prompt_on_aspect(knowledge, entries, part, rng, aspects=CARE)


def prompt_with_red_flag(knowledge: Knowledge, entries: Sequence[Entry], part: str, rng: random.Random) -> PairPrompt:
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
        return PairPrompt(
            entry.language, entry, "urgent", question, reply_in(knowledge, entry, "urgent", wording, rng), wording
        )
    flag = rng.choice(entry.fields["red_flags"])
    question = rng.choice(phrasings["red_flag_frames"][part]).format(n=rng.choice(entry.names), r=flag)
    chosen = reply_in(knowledge, entry, "red_flag", wording, rng, red_flag=flag)
    return PairPrompt(entry.language, entry, "red_flag", question, chosen, wording)


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


TWIN_PROMPTS = {
    "ignores a red flag": partial(prompt_on_twins, category="emergency", is_twin=False),
    "alarms": partial(prompt_on_twins, category="emergency", is_twin=True),
    "complies": partial(prompt_on_twins, category="refusal", is_twin=False),
    "refuses": partial(prompt_on_twins, category="refusal", is_twin=True),
}


# The replies to emergencies and requests, where they do not belong: without them whatever sounds an alarm or refuses
# would be the better reply of nearly all pairs it is in.
MISPLACED_PROMPTS = {
    "alarms anyway": partial(prompt_without_alarm, category="emergency"),
    "refuses anyway": partial(prompt_without_alarm, category="refusal"),
    "alarms at a request": partial(prompt_on_twins, category="refusal", is_twin=False),
    "refuses an emergency": partial(prompt_on_twins, category="emergency", is_twin=False),
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


def reject_with(pool: str, knowledge: Knowledge, entries: Sequence[Entry], prompt: PairPrompt, length: int, rng) -> str:
    """Sentences with one failure that suit no question; for a situation also an answer off the point or to its twin."""
    if prompt.reply_to_twin and rng.random() < SHARE_FOR_THE_TWIN:
        return prompt.reply_to_twin
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
    knowledge: Knowledge, entries: Sequence[Entry], prompt: PairPrompt, length: int, rng: random.Random
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


def reject_misplaced(
    category: str,
    is_harmless: bool,
    knowledge: Knowledge,
    entries: Sequence[Entry],
    prompt: PairPrompt,
    length: int,
    rng: random.Random,
) -> str:
    """The right reply to some other emergency or request (`category`).

    Unless the question is harmless, not one with the number to call in despair: nobody should unlearn to give it.
    """
    replies = {
        situation["reply"]
        for situation in [*knowledge.safety, *knowledge.safety_twins]
        if situation["category"] == category and situation["language"] == prompt.language
    }
    fit = sorted(reply for reply in replies if is_harmless or not any(line in reply for line in CRISIS_LINES))
    return min(rng.sample(fit, min(6, len(fit))), key=lambda reply: abs(len(reply) - length))


def reject_wrong_condition(knowledge: Knowledge, entries: Sequence[Entry], prompt: PairPrompt, length: int, rng) -> str:
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


def reject_cut_off(knowledge: Knowledge, entries: Sequence[Entry], prompt: PairPrompt, length: int, rng) -> str:
    """The answer, longer where there is need, that breaks off in the middle of a phrase."""
    more = [aspect for aspect in prompt.entry.aspects if aspect != prompt.aspect]
    space = "" if prompt.entry.language == "zh" else " "
    text = space.join([prompt.chosen, *(knowledge.reply(prompt.entry, a) for a in rng.sample(more, 2))])
    while length > 1 and not (text[length - 1].isalnum() and text[length].isalnum()):
        length -= 1
    return text[:length]


def reject_repetition(knowledge: Knowledge, entries: Sequence[Entry], prompt: PairPrompt, length: int, rng) -> str:
    """The beginning of the answer over and over."""
    return repeat_beginning(prompt.chosen, length)


def repeat_beginning(text: str, length: int) -> str:
    """The first phrases of a text over and over, to about `length` characters; "" for a text without words."""
    unit = ""
    for phrase in re.findall(r"[^，。；：、！？,.;:!?\n]+[，。；：、！？,.;:!?\n]*\s*", text):
        if unit and len(unit) + len(phrase) > length / 2:
            break
        unit += phrase
    return (unit * max(2, round(length / len(unit)))).strip() if unit else ""


def reject_dose(knowledge: Knowledge, entries: Sequence[Entry], prompt: PairPrompt, length: int, rng) -> str:
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
    "alarms": partial(reject_with, "alarming"),
    "complies": partial(reject_with, "compliant"),
    "refuses": partial(reject_with, "unhelpful"),
    "alarms anyway": partial(reject_misplaced, "emergency", True),
    "refuses anyway": partial(reject_misplaced, "refusal", True),
    "alarms at a request": partial(reject_misplaced, "emergency", False),
    "refuses an emergency": partial(reject_misplaced, "refusal", False),
    "cut off": reject_cut_off,
    "repeats": reject_repetition,
    "invents a dose": reject_dose,
}
