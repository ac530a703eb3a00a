"""The forms of the documents that the embedded base model reads, and the sentences that they are made of.

The wordings are in data/knowledge/corpus_forms.json: `[one|another]` stands for one of them, `{n}` for a name.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from medtune.sample_data.exam import LETTERS
from medtune.sample_data.knowledge import CONDITION_ASPECTS, IMPERATIVES, MEDICINE_ASPECTS, Entry, joined

ALTERNATIVES = re.compile(r"\[([^\[\]]*)\]")
# Fields that are steps, which keep their order.
ORDERED_FIELDS = {"first_aid", "how_to_take"}
# Aspects that two entries can be compared in.
COMPARED = {
    "condition": ("causes", "symptoms", "examinations", "diet_and_care", "prevention", "red_flags", "department"),
    "medicine": ("uses", "how_to_take", "side_effects", "not_for", "interactions"),
}
# Aspects by which a condition or medicine can be told without its name.
CLUES = {
    "condition": ("causes", "symptoms", "symptoms", "examinations", "red_flags"),
    "medicine": ("uses", "side_effects", "not_for", "interactions"),
}


@dataclass(frozen=True)
class Shelf:
    """The entries of one language, and the wordings of its documents."""

    language: str
    entries: list[Entry]
    forms: dict

    @cached_property
    def clauses(self) -> list[str]:
        """All phrases of the entries."""
        lists = [value for entry in self.entries for value in entry.fields.values() if isinstance(value, list)]
        return [clause for values in lists for clause in values if isinstance(clause, str)]

    @cached_property
    def by_sign(self) -> dict[str, list[tuple[Entry, str]]]:
        """Conditions, each with the symptom that has the sign in it, of signs that several conditions have."""
        found = {
            sign: [
                (entry, clause)
                for entry in self.entries
                for clause in entry.fields.get("symptoms", ())
                if sign in clause.lower()
            ]
            for sign in self.forms["signs"]
        }
        return {sign: pairs for sign, pairs in found.items() if len({entry.key for entry, _ in pairs}) > 2}

    @cached_property
    def departments(self) -> list[str]:
        return sorted({entry.fields["department"] for entry in self.entries})


class Composer:
    """Composes one document about an entry; every choice comes from its random generator."""

    def __init__(self, shelf: Shelf, entry: Entry, rng: random.Random):
        self.shelf, self.entry, self.rng = shelf, entry, rng
        self.forms, self.is_chinese = shelf.forms, shelf.language == "zh"

    # ------------------------------------------------------------ words

    def word(self, wordings: Sequence[str], **slots: str) -> str:
        """One of the wordings, its alternatives chosen and its slots filled; {p} is some person."""
        text = ALTERNATIVES.sub(lambda group: self.rng.choice(group[1].split("|")), self.rng.choice(wordings))
        text = text.format(**({"p": self.person()} | slots))
        return text if self.is_chinese else text[:1].upper() + text[1:]

    def join(self, sentences: Sequence[str]) -> str:
        return ("" if self.is_chinese else " ").join(filter(None, sentences))

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def some(self, items: Sequence, low: int, high: int) -> list:
        """At least `low` and at most `high` of the items, in any order."""
        return self.rng.sample(items, min(len(items), self.rng.randint(low, high)))

    def person(self) -> str:
        given, surnames = self.forms["given"], self.forms["surnames"]
        if self.is_chinese:
            return self.rng.choice(surnames) + "".join(self.rng.choices(given, k=self.rng.randint(1, 2)))
        return f"{self.rng.choice(given.split())} {self.rng.choice(surnames.split())}"

    def name(self, entry: Entry) -> str:
        return entry.fields["name"] if self.chance(0.7) else self.rng.choice(entry.names)

    def enumerate(self, items: Sequence[str], field: str = "") -> str:
        """Phrases as one enumeration, in one of several ways."""
        items = list(items)
        if not self.is_chinese:
            return "; ".join(items) if self.chance(0.2) else joined(items, field, "en")
        ways = ["；", "，"] if field in IMPERATIVES | {"medicines"} else ["、", "、", "，", "；"]
        if len(items) > 1 and self.chance(0.3):
            *items, last = items
            tail = self.rng.choice(
                ["以及", "，还有", "，或者"] if field in {"symptoms", "red_flags"} else ["以及", "，还有"]
            )
            return self.rng.choice(["、", "，"]).join(items) + tail + last
        return self.rng.choice(ways).join(items)

    # ------------------------------------------------------------ facts

    def clauses(self, entry: Entry, field: str, most: int = 9) -> list[str]:
        """The phrases of a field, often not all of them and mostly in another order."""
        clauses = list(entry.fields[field])
        count = len(clauses) if self.chance(0.6) else self.rng.randint(1, len(clauses))
        if field not in ORDERED_FIELDS and self.chance(0.8):
            self.rng.shuffle(clauses)
        return clauses[: min(count, most)]

    def listing(self, entry: Entry, field: str, most: int = 9) -> str:
        if field == "department":
            return entry.fields["department"]
        return self.enumerate(self.clauses(entry, field, most), field)

    def slots(self, entry: Entry, aspect: str) -> dict[str, str]:
        """What the wordings of an aspect leave open."""
        fields, slots = entry.fields, {"d": entry.fields["department"]}
        if aspect in {"overview", "overdose"}:
            return slots | {"x": self.rng.choice(sentences_of(fields[aspect], self.is_chinese))}
        if aspect == "also":
            return slots | {"x": self.enumerate(fields["aliases"])}
        if aspect == "department":
            return slots
        if aspect == "treatment":
            return slots | {"x": self.join(self.some(fields["treatment"], 1, 2))}
        if aspect == "medicines":
            medicines = self.some(fields["medicines"], 1, 4)
            form = "{name}（{caution}）" if self.is_chinese else "{name} ({caution})"
            return slots | {
                "x": self.enumerate([form.format(**medicine) for medicine in medicines], aspect),
                "m": self.enumerate([medicine["name"] for medicine in medicines]),
                "a": medicines[0]["name"],
                "c": medicines[0]["caution"],
            }
        field = "first_aid" if aspect == "urgent" else aspect
        first, *more = self.some(fields[field], 2, 2)
        return slots | {"x": self.listing(entry, field), "a": first, "b": more[0] if more else first}

    def sentence(self, entry: Entry, aspect: str, name: str) -> str:
        """One aspect of an entry in one of its wordings; where to go with an emergency begins with the ambulance."""
        wordings, slots = self.forms[entry.fields["kind"]][aspect], self.slots(entry, aspect)
        if not any(own.lower() in slots.get("x", own).lower() for own in entry.names):
            wordings = [wording for wording in wordings if "{n}" in wording]
        text = self.word(wordings, n=name, **slots)
        if aspect == "department" and is_urgent(entry):
            return self.join([self.sentence(entry, "urgent", name), text])
        return text

    def pronoun(self, entry: Entry) -> str:
        return self.rng.choice(self.forms["pronouns"][entry.fields["kind"]])

    def others(self, count: int, like: Entry, of_its_field: bool) -> list[Entry]:
        """Entries of the same kind, from the same part of medicine or from the others."""
        pool = [
            entry
            for entry in self.shelf.entries
            if entry.is_medicine == like.is_medicine
            and entry.key != like.key
            and (like.is_medicine or (entry.fields["field"] == like.fields["field"]) == of_its_field)
        ]
        return self.rng.sample(pool, min(count, len(pool)))


def is_urgent(entry: Entry) -> bool:
    return not entry.is_medicine and entry.fields["urgent"]


def aspects_of(entry: Entry) -> list[str]:
    """The aspects that a document can tell of an entry."""
    kept = MEDICINE_ASPECTS if entry.is_medicine else CONDITION_ASPECTS
    aspects = [aspect for aspect in kept if aspect not in {"dose", "advice", "department"}] + ["department"]
    if entry.fields["aliases"]:
        aspects.append("also")
    if not entry.is_medicine and entry.fields["first_aid"]:
        aspects.append("urgent" if entry.fields["urgent"] else "first_aid")
    return aspects


def sentences_of(text: str, is_chinese: bool) -> list[str]:
    return [sentence.strip() for sentence in re.findall(r"[^。]+。" if is_chinese else r"[^.]+\.", text)]


# ---------------------------------------------------------------- forms
# Each takes a composer and returns a document, or None where its entry does not suit it.


def article(c: Composer) -> str:
    """A lecture note or a leaflet: several aspects in running text, in sections or in points."""
    entry, forms = c.entry, c.forms
    aspects = c.some(aspects_of(entry), 3, 7)
    if is_urgent(entry) and "urgent" not in aspects:
        aspects.insert(0, "urgent")
    name, parts = c.name(entry), []
    layout = c.rng.choice(("text", "text", "sections", "points"))
    for aspect in aspects:
        called = name
        if parts and aspect != "also" and c.chance(0.45):
            called = c.pronoun(entry) if c.chance(0.7) else c.name(entry)
        heading = c.word(forms["headings"][aspect]) if layout != "text" else ""
        if layout == "points" and isinstance(entry.fields.get(aspect), list) and aspect != "medicines":
            bullet = c.rng.choice(forms["notes"]["bullets"])
            points = [bullet.format(i=number) + clause for number, clause in enumerate(c.clauses(entry, aspect), 1)]
            parts.append("\n".join([heading, *points]))
        else:
            colon = "：" if c.is_chinese else ": "
            parts.append((heading + colon if heading else "") + c.sentence(entry, aspect, called))
        if layout == "text" and c.chance(0.06):
            parts.append(c.word(forms["links"]))
    opening = c.word(forms["medicine_openings" if entry.is_medicine else "openings"], n=name)
    closing = c.word(forms["closings"], n=name, d=entry.fields["department"])
    body = [opening if c.chance(0.4) else "", *parts, closing if c.chance(0.4) else ""]
    text = c.join(body) if layout == "text" else "\n".join(filter(None, body))
    if layout == "text" and c.chance(0.5):
        return text
    return c.word(forms["titles"], n=name) + (c.rng.choice("\n。：") if c.is_chinese else "\n") + text


def definition(c: Composer) -> str:
    """One to three sentences about one thing."""
    name = c.name(c.entry)
    first, *more = c.some(aspects_of(c.entry), 1, 3)
    following = [c.sentence(c.entry, aspect, name if aspect == "also" else c.pronoun(c.entry)) for aspect in more]
    return c.join([c.sentence(c.entry, first, name), *following])


def questions_page(c: Composer) -> str:
    """Questions with answers that take their names over, on one entry or on several."""
    forms = c.forms["pages"]
    entries = [c.entry] * 9 if c.chance(0.5) else [c.entry, *c.rng.sample(c.shelf.entries, 5)]
    layout, parts = c.rng.choice(forms["layouts"]), [c.word(forms["open"])]
    for entry in entries[: c.rng.randint(2, 5)]:
        aspect, name = c.rng.choice(aspects_of(entry)), c.name(entry)
        question = c.word(c.forms["questions"][entry.fields["kind"]][aspect], n=name)
        answer = [c.sentence(entry, aspect, name)]
        if c.chance(0.3):
            answer.append(c.sentence(entry, "red_flags" if c.chance(0.5) else "department", c.pronoun(entry)))
        parts.append(c.word([layout], q=question, a=c.join(answer)))
    return "\n".join(filter(None, parts))


def comparison(c: Composer) -> str | None:
    """Two entries side by side."""
    others = c.others(1, c.entry, of_its_field=True)
    if not others:
        return None
    pair, forms = [c.entry, *others], c.forms["comparison"]
    names = {"n": c.name(pair[0]), "o": c.name(pair[1])}
    parts = [c.word(forms["open"], **names)]
    for aspect in c.some(COMPARED[c.entry.fields["kind"]], 2, 4):
        first, second = (c.listing(entry, aspect, most=3) for entry in pair)
        parts.append(c.word(forms[aspect], x=first, y=second, **names))
    if urgent := [entry for entry in pair if is_urgent(entry)]:
        parts += [c.sentence(entry, "urgent", c.name(entry)) for entry in urgent]
    if c.chance(0.6):
        parts.append(c.word(forms["close"], **names))
    return c.join(parts) if c.chance(0.8) else "\n".join(parts)


def complaint_of(c: Composer) -> str:
    """One of the complaints that are not held out, without its full stop."""
    return c.rng.choice(c.entry.fields["complaints"][:2]).rstrip("。.")


def reasoning(c: Composer) -> str | None:
    """From a complaint to the condition, and what follows from it."""
    entry, forms = c.entry, c.forms["reasoning"]
    if entry.is_medicine:
        return None
    name, signs = c.name(entry), c.slots(entry, "symptoms")
    parts = [c.word(forms["hear"], c=complaint_of(c))]
    if c.chance(0.6):
        parts.append(c.word(forms["weigh"], **signs))
    for other in c.others(c.rng.randint(0, 2), entry, of_its_field=True):
        sign = c.rng.choice(other.fields["symptoms"])
        parts.append(c.word(forms["other"], o=c.name(other), y=sign))
    parts.append(c.word(forms["conclude"], n=name))
    if c.chance(0.6):
        parts.append(c.word(forms["because"], n=name, x=c.listing(entry, "symptoms", most=3)))
    following = ["urgent"] if is_urgent(entry) else c.some(("department", "examinations", "red_flags"), 1, 3)
    if entry.fields["first_aid"] and not is_urgent(entry):
        following.insert(0, "first_aid")
    return c.join([*parts, *(c.sentence(entry, aspect, name) for aspect in following)])


def case(c: Composer) -> str | None:
    """The story of a patient, with the dialogue told."""
    entry, forms, fields = c.entry, c.forms["case"], c.entry.fields
    if entry.is_medicine:
        return None
    facts = {"p": c.person(), "n": c.name(entry), "d": fields["department"], "t": c.word(forms["times"])}
    if not c.is_chinese:
        facts["t"] = facts["t"][0].lower() + facts["t"][1:]
    parts = [c.word(forms["arrive"], **facts), c.word(forms["say"], c=complaint_of(c), **facts)]
    for turn in c.some(fields["follow_up"], 0, 2):
        parts.append(c.word(forms["ask"], q=turn["ask"], r=turn["tell"].rstrip("。"), **facts))
    parts.append(c.word(forms["think"], x=c.listing(entry, "symptoms", most=3), **facts))
    if is_urgent(entry):
        parts.append(c.word(forms["hurry"], x=c.listing(entry, "first_aid"), **facts))
    if c.chance(0.8):
        parts.append(c.word(forms["go"], x=c.listing(entry, "examinations"), **facts))
    if c.chance(0.5):
        parts.append(c.word(forms["warn"], x=c.listing(entry, "red_flags", most=3), **facts))
    if c.chance(0.5):
        parts.append(c.word(forms["advise"], x=c.listing(entry, "diet_and_care"), **facts))
    if c.chance(0.5):
        parts.append(c.word(forms["end"], **facts))
    return c.join(parts)


def glossary(c: Composer) -> str:
    """Several names, each with a sentence."""
    forms, parts = c.forms["glossary"], []
    entries = [c.entry, *c.rng.sample([e for e in c.shelf.entries if e.key != c.entry.key], c.rng.randint(2, 6))]
    c.rng.shuffle(entries)
    style = c.rng.choice(forms["items"])
    for entry in entries:
        wording = style if entry.fields["aliases"] or "{l}" not in style else forms["items"][0]
        sentence = c.rng.choice(sentences_of(entry.fields["overview"], c.is_chinese))
        parts.append(c.word([wording], n=c.name(entry), x=sentence, l=c.enumerate(entry.fields["aliases"])))
    return "\n".join([c.word(forms["open"])] * c.chance(0.7) + parts)


def department_list(c: Composer) -> str | None:
    """What a department sees."""
    forms, department = c.forms["department_list"], c.entry.fields["department"]
    entries = [e for e in c.shelf.entries if e.fields["department"] == department and not e.is_medicine]
    if len(entries) < 2:
        return None
    entries = c.some(entries, 2, 7)
    names = {entry.key: c.name(entry) for entry in entries}
    listed = c.word(forms["list"], d=department, x=c.enumerate(list(names.values())))
    parts = [c.word(forms["open"], d=department), listed]
    for entry in c.some(entries, 1, 4):
        slots = {"x": c.listing(entry, "symptoms", most=2), "y": c.listing(entry, "examinations", most=2)}
        parts.append(c.word(forms["item"], n=names[entry.key], d=department, **slots))
        if is_urgent(entry):
            parts.append(c.sentence(entry, "urgent", names[entry.key]))
    return c.join(parts)


def sign_list(c: Composer) -> str:
    """Conditions that share a sign."""
    forms, sign = c.forms["sign_list"], c.rng.choice(list(c.shelf.by_sign))
    parts = [c.word(forms["open"], s=sign)]
    style = c.rng.choice(forms["item"])
    for entry, clause in c.some(c.shelf.by_sign[sign], 3, 6):
        wording = style if c.chance(0.5) else c.rng.choice(forms["item"])
        parts.append(c.word([wording], n=c.name(entry), x=clause, d=entry.fields["department"]))
    if c.chance(0.5):
        parts.append(c.word(forms["close"], s=sign))
    return c.join(parts) if c.chance(0.6) else "\n".join(parts)


def riddle(c: Composer) -> str | None:
    """Which condition, medicine or department is it: with the answer, often with names or letters to choose from."""
    entry, forms = c.entry, c.forms["riddle"]
    asks_department = not entry.is_medicine and not is_urgent(entry) and c.chance(0.25)
    name = entry.fields["department"] if asks_department else c.name(entry)
    if not entry.is_medicine and c.chance(0.4):
        clue = f"“{complaint_of(c)}。”" if c.is_chinese else f'"{complaint_of(c)}."'
    else:
        aspects = c.some(CLUES[entry.fields["kind"]], 1, 3)
        clue = c.join([c.sentence(entry, aspect, c.pronoun(entry)) for aspect in aspects])
    if any(own.lower() in clue.lower() for own in [*entry.names, name]):
        return None
    opening = "department_open" if asks_department else "medicine_open" if entry.is_medicine else "open"
    parts = [c.word(forms[opening]), clue]
    if c.chance(0.6):
        if asks_department:
            wrong = [d for d in c.shelf.departments if not set(d) & set(name) - set("科内外急诊医学门")]
            options = c.rng.sample(wrong, min(len(wrong), c.rng.randint(2, 4)))
        else:
            options = [c.name(other) for other in c.others(c.rng.randint(2, 4), entry, of_its_field=False)]
        options.insert(c.rng.randint(0, len(options)), name)
        if c.chance(0.5):
            lettered = "\n".join(f"{letter}．{option}" for letter, option in zip(LETTERS, options, strict=False))
            lettered = lettered if c.chance(0.5) else lettered.replace("\n", "  ")
            parts.append("\n" + c.word(forms["letters"], o=lettered + "\n"))
            answer = c.word(forms["letter_answer"], k=LETTERS[options.index(name)], n=name)
        else:
            parts.append(c.word(forms["choose"], o=c.enumerate(options)))
            answer = c.word(forms["answer"], n=name)
    else:
        answer = c.word(forms["answer"], n=name)
    parts.append(answer)
    if asks_department:
        parts.append(c.sentence(entry, "department", c.name(entry)))
    elif is_urgent(entry):
        parts.append(c.sentence(entry, "urgent", name))
    elif c.chance(0.5):
        aspect = c.rng.choice(CLUES[entry.fields["kind"]])
        parts.append(c.word(forms["why"], x=c.sentence(entry, aspect, name)))
    return c.join(parts)


def notes(c: Composer) -> str:
    """Single facts on different entries, as running text or as points."""
    forms = c.forms["notes"]
    entries = [c.entry, *c.rng.sample(c.shelf.entries, c.rng.randint(2, 6))]
    facts = [c.sentence(entry, c.rng.choice(aspects_of(entry)), c.name(entry)) for entry in entries]
    bullet = c.rng.choice(forms["bullets"])
    opening = c.word(forms["open"])
    if c.chance(0.5):
        return c.join([opening, *facts])
    return "\n".join([opening] * bool(opening) + [bullet.format(i=n) + fact for n, fact in enumerate(facts, 1)])


def copying(c: Composer) -> str:
    """Names, phrases and numbers that return as they stood: what a small model needs in order to copy a name."""
    forms, rng = c.forms["copying"], c.rng
    kind = rng.choice(["roll", "read", "spell", "codes", "invented", "invented", "unknown", "unknown", "unknown"])
    if kind == "roll":
        visits = {c.person(): rng.choice(c.shelf.departments) for _ in range(rng.randint(3, 6))}
        style = rng.choice(forms["roll_item"])
        roll = c.enumerate([c.word([style], p=person, d=department) for person, department in visits.items()])
        called = [c.word(forms["called"], p=p, d=d) for p, d in c.some(list(visits.items()), 2, 6)]
        return c.join([c.word(forms["roll"], x=roll), *called])
    if kind == "codes":
        files = {c.person(): f"{rng.choice('ABCDEFGHJK')}{rng.randint(100, 99999)}" for _ in range(rng.randint(3, 6))}
        stored = [c.word(forms["codes"], p=person, k=code) for person, code in files.items()]
        return c.join([*stored, *(c.word(forms["code_asked"], p=p, k=k) for p, k in c.some(list(files.items()), 2, 6))])
    if kind == "invented":
        style, parts = rng.choice(forms["invented_item"]), [c.word(forms["invented"])]
        parts += [c.word([style], x=invented_name(c)) for _ in range(rng.randint(3, 7))]
        return c.join(parts)
    if kind == "unknown":
        style, parts = rng.choice(forms["unknown_item"]), [c.word(forms["unknown"])]
        for _ in range(rng.randint(2, 5)):
            name = invented_name(c)
            asked = rng.choice(list(c.forms["questions"]["condition"].values()))
            parts.append(c.word([style], q=c.word(asked, n=name), x=name))
        return "\n".join(filter(None, parts))
    parts = []
    for _ in range(rng.randint(2, 4)):
        phrases = rng.sample(c.shelf.clauses, rng.randint(1, 4)) if c.chance(0.5) else c.some(names_on(c.shelf), 1, 4)
        parts.append(c.word(forms[kind], x=c.enumerate(phrases)))
    return c.join(parts)


def invented_name(c: Composer) -> str:
    """A name that no condition has, from parts of real ones."""
    parts = map(c.rng.choice, c.forms["name_parts"])
    return ("" if c.is_chinese else " ").join(filter(None, parts))


def names_on(shelf: Shelf) -> list[str]:
    return [name for entry in shelf.entries for name in entry.names]


def everyday_prose(c: Composer) -> str:
    """General prose on health, hospitals and the body."""
    parts = []
    for topic in c.some(c.forms["topics"], 1, 2):
        title, *sentences = topic
        parts += [c.word([title])] * c.chance(0.6) + [c.word([wording]) for wording in c.some(sentences, 3, 7)]
    return c.join(parts)


# How often each form is chosen.
DocumentForm = Callable[[Composer], str | None]
FORMS: dict[DocumentForm, float] = {
    article: 0.20, definition: 0.07, questions_page: 0.12, comparison: 0.07, reasoning: 0.11, case: 0.08,
    glossary: 0.04, department_list: 0.02, sign_list: 0.03, riddle: 0.13, notes: 0.05, copying: 0.06,
    everyday_prose: 0.02,
}  # fmt: skip
