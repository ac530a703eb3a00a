"""Training data other than pairs: pretraining text, dialogues, and questions for PPO."""

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from medtune.sample_data.knowledge import HELD_OUT, Entry, Knowledge, joined, seeded

# Of the aspects of each entry, those that are asked about a third time, as people ask.
SHARE_IN_LAY_WORDS = 0.5
# Of the emergencies, requests to refuse and their twins, those that are learned in a frame too.
SHARE_FRAMED = 0.5


def build_documents(knowledge: Knowledge) -> list[str]:
    """Four documents for each entry: three with all its content, and one in other words."""
    documents = []
    for entry in knowledge.entries:
        rng, text = seeded("document", entry.key), partial(knowledge.reply, entry)
        phrasings = knowledge.phrasings[entry.language]["documents"]
        titles = [title.format(name=entry.fields["name"]) for title in phrasings["titles"]]
        aliases = joined(entry.fields["aliases"], "aliases", entry.language)
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


def dialogue(*turns: str, system: str = "") -> dict:
    """The guide's form of a dialogue, from alternating turns that begin with the person's."""
    turns_with_roles = [{"from": "system", "value": system}] if system else []
    turns_with_roles += [{"from": ("human", "gpt")[index % 2], "value": turn} for index, turn in enumerate(turns)]
    return {"conversations": turns_with_roles}


def first_question(record: dict) -> str:
    return next(turn["value"] for turn in record["conversations"] if turn["from"] == "human")


def build_dialogues(knowledge: Knowledge, unseen: set[str]) -> list[dict]:
    """The dialogues that the evaluation is chosen against: questions, longer talks, emergencies and refusals."""
    conversations: list[list[str]] = []
    for entry in (entry for entry in knowledge.entries if entry.fields["id"] not in unseen):
        conversations += ask_each_aspect(knowledge, entry)
        conversations += talk_on(knowledge, entry)
        if not entry.is_medicine:
            conversations += complain(knowledge, entry)
    for situation in knowledge.safety:
        conversations += [[question, situation["reply"]] for question in situation["questions"]["train"]]

    dialogues = with_system_prompts(knowledge, conversations)
    first_turns = set(map(first_question, dialogues))
    dialogues += [d for d in knowledge.dialogues if first_question(d) not in first_turns]
    seeded("dialogues").shuffle(dialogues)
    return dialogues


def build_further_dialogues(
    knowledge: Knowledge, unseen: set[str], exam: Iterable[tuple[str, str]], asked: set[str]
) -> list[dict]:
    """Dialogues that leave the evaluation as it is: lay words, more names and complaints, safety, the exam's.

    `asked` are the questions that other dialogues begin with.
    """
    bare, framed = (safety_exchanges(knowledge, "train", are_framed) for are_framed in (False, True))
    conversations = [list(exchange) for exchange in (*bare, *framed, *exam)]
    for entry in (entry for entry in knowledge.entries if entry.fields["id"] not in unseen):
        conversations += ask_in_lay_words(knowledge, entry)
        conversations += complain_in_more_words(knowledge, entry)
    for entry in knowledge.more_entries:
        conversations += ask_some_aspects(knowledge, entry)
    return with_system_prompts(knowledge, [turns for turns in conversations if turns[0] not in asked])


def with_system_prompts(knowledge: Knowledge, conversations: Iterable[Sequence[str]]) -> list[dict]:
    """Dialogues of different first questions, one in five with a system prompt."""
    dialogues = {}
    for turns in conversations:
        if turns[0] not in dialogues:
            rng = seeded("system", turns[0])
            prompts = knowledge.phrasings[language_asked_in(turns[0])]["system_prompts"]["train"]
            dialogues[turns[0]] = dialogue(*turns, system=rng.choice(prompts) if rng.random() < 0.2 else "")
    return list(dialogues.values())


def safety_exchanges(knowledge: Knowledge, part: str, are_framed: bool) -> Iterator[tuple[str, str]]:
    """Emergencies and requests to refuse, each followed by its twin; a part of them where framed.

    `part`: "train" or "preference".
    """
    for situation in knowledge.safety_twins:
        for asked in (asked for asked in situation["questions"] if asked["part"] == part):
            exchanges = [(asked["question"], situation["reply"], situation["category"] == "emergency")]
            exchanges += [(asked["twin"], asked["twin_reply"], False)] if "twin" in asked else []
            for question, reply, is_emergency in exchanges:
                rng = seeded("frame", question)
                if not are_framed:
                    yield question, reply
                elif rng.random() < SHARE_FRAMED:
                    yield in_a_frame(knowledge, question, is_emergency, rng), reply


def in_a_frame(knowledge: Knowledge, text: str, is_emergency: bool, rng: random.Random) -> str:
    """An emergency asked as other complaints are, so that no question mark tells it from its twin; else a greeting."""
    phrasings = knowledge.phrasings[language_asked_in(text)]
    if is_emergency:
        return rng.choice(phrasings["complaint_frames"]["train"]).format(c=text.rstrip("。.？"))
    return rng.choice(phrasings["greetings"]) + text


def language_asked_in(question: str) -> str:
    return "zh" if re.search("[\u4e00-\u9fff]", question) else "en"


def ask_in_lay_words(knowledge: Knowledge, entry: Entry) -> Iterator[list[str]]:
    """A part of the aspects once more: how the matter came up, with the name in it, and then the question."""
    phrasings = knowledge.phrasings[entry.language]["lay_questions"][entry.fields["kind"]]
    space = "" if entry.language == "zh" else " "
    for aspect in entry.aspects:
        rng = seeded("lay words", entry.key, aspect)
        if rng.random() < SHARE_IN_LAY_WORDS:
            opening = rng.choice(phrasings["openings"]).format(n=rng.choice(entry.names))
            question = rng.choice(phrasings["questions"][aspect])
            yield [f"{opening}{space}{question}", knowledge.reply(entry, aspect)]


def ask_each_aspect(knowledge: Knowledge, entry: Entry) -> Iterator[list[str]]:
    """Two ways to ask about each aspect, once by the name and once by any of its names."""
    for aspect in entry.aspects:
        rng = seeded("aspect", entry.key, aspect)
        ways = rng.sample(knowledge.questions(entry, aspect, "train"), 2)
        for way, name in zip(ways, (entry.fields["name"], rng.choice(entry.names)), strict=True):
            yield [way.format(n=name), knowledge.reply(entry, aspect)]


def ask_some_aspects(knowledge: Knowledge, entry: Entry) -> Iterator[list[str]]:
    """Half of the aspects once each: more names, so that a model copies the name asked about, also a new one."""
    rng = seeded("some aspects", entry.key)
    for aspect in rng.sample(entry.aspects, len(entry.aspects) // 2):
        way = rng.choice(knowledge.questions(entry, aspect, "train"))
        yield [way.format(n=rng.choice(entry.names)), knowledge.reply(entry, aspect)]


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


def complain_in_more_words(knowledge: Knowledge, entry: Entry) -> Iterator[list[str]]:
    """Complaints in further words, each once. Half of the urgent ones end as statements, as emergencies often come."""
    phrasings, stop = knowledge.phrasings[entry.language], "。" if entry.language == "zh" else "."
    for number, complaint in enumerate(entry.more_complaints):
        frame = seeded("more complaints", entry.key, number).choice(phrasings["complaint_frames"]["train"])
        is_bare = entry.fields["urgent"] and number % 2 == 0
        question = complaint + stop if is_bare else frame.format(c=complaint)
        yield [question, knowledge.reply(entry, "urgent" if entry.fields["urgent"] else "complaint")]


def build_prompts(knowledge: Knowledge, unseen: set[str], dialogues: Sequence[dict]) -> list[dict]:
    """Questions in other words than the dialogues': emergencies, requests to refuse, and one for each entry."""
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
