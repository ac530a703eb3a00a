"""The letter that an answer to an exam question commits to, as a careful reader would mark it."""

import re
import unicodedata
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

from medtune.measuring import choice_words as words
from medtune.measuring.option_marks import MARK, mark_options

# A reply may repeat itself for thousands of characters.
WINDOW = 200
LEAD = 12  # columns before the verdict of a clause that goes on about the same option


class Standing(IntEnum):
    """What an answer says of an option where it names it; the highest counts."""

    RULED_OUT = 0
    TENTATIVE = 1  # at first, by others, or on a condition
    NAMED = 2
    FAVOURED = 3
    PREFERRED = 4  # to others
    CHOSEN = 5


class Mention(NamedTuple):
    """letters: of the options that are named together. is_added: "also", to the mention before it."""

    letters: frozenset[str]
    standing: Standing
    is_added: bool


def written_letter(answer: str, options: dict[str, str]) -> str | None:
    """The letter of the option that an answer chooses by letter or by words; None if it chooses several or none.

    answer: a reply without its thought. The last choice counts ("答案：C", "C is better"); without a choice, the only
        option named that is not ruled out.
    options: letter to words.
    """
    for question in words.NEXT_QUESTION.finditer(answer):
        if letter := _letter(answer[: question.start()], options):
            return letter
    return _letter(answer, options)


def _letter(answer: str, options: dict[str, str]) -> str | None:
    final = ["".join(groups) for groups in words.FINAL_FORM.findall(answer)]
    text = mark_options(final[-1] if final else answer, options)
    text = words.LABEL_AND_DOT.sub(r"\1: ", words.EITHER.sub(r"⟦\1\2⟧", text))
    text = words.EXCEPT.sub(lambda match: f"选⟦{next(filter(None, match.groups()))}⟧", text)
    ruled_out: set[str] = set()
    held: list[Mention] = []
    for mention in _mentions(text, "".join(options)):
        if mention.standing is Standing.RULED_OUT:
            ruled_out |= mention.letters
            held = [other for other in held if other.standing is Standing.CHOSEN or not other.letters & ruled_out]
        else:
            held.append(mention)
    highest = max((mention.standing for mention in held), default=Standing.NAMED)
    best = [mention for mention in held if mention.standing is highest]
    if highest >= Standing.PREFERRED:
        best = best[-2:] if best[-1].is_added else best[-1:]
    letters = {letter for mention in best for letter in mention.letters}
    if highest <= Standing.NAMED:
        letters -= ruled_out
    return letters.pop() if len(letters) == 1 else None


def _mentions(text: str, letters: str) -> Iterator[Mention]:
    """The mentions of a marked text, in questions only those answered; one about to be discussed may be any option.

    letters: of all options, in their order.
    """
    marks = list(re.finditer(MARK, text))
    alone = _stated_alone(text, letters)
    standing, whole = Standing.NAMED, ""
    for n, mark in enumerate(marks):
        since = text[marks[n - 1].end() if n else 0 : mark.start()]
        until = text[mark.end() : marks[n + 1].start() if n + 1 < len(marks) else len(text)]
        sentence, behind = words.SENTENCE_END.split(since)[-1], words.SENTENCE_END.split(until)[0]
        is_first = not n or sentence != since  # in its sentence
        end = words.SENTENCE_END.search(text, mark.end(), mark.end() + WINDOW)
        asked = words.ASKED_BEHIND.match(until)
        if ((end and end[0] == "?") or asked) and not words.WHY.search(sentence):
            start = mark.end() + len(asked[0]) if asked else end.end()
            is_of_others = not is_first or start > mark.end() + len(until)
            answer = words.ANSWER.match(text, start)
            if answer and not (is_of_others or words.NEGATED_QUESTION.search(f"{sentence}{behind}")):
                standing = Standing.RULED_OUT if answer["wrong"] else Standing.FAVOURED
                yield Mention(frozenset(mark[1]), standing, is_added=False)
            continue
        before = sentence[-WINDOW:]
        if behind == until and n + 1 < len(marks):
            behind = _without_what_is_said_of_the_next(behind)
        behind = behind[:WINDOW]
        clause = words.CLAUSE_END.split(before)[-1]
        is_added = bool(n and (words.ALSO_BEFORE.match(clause) or words.ALSO_BEHIND.match(until)))
        earlier, standing = standing, _standing(before, clause, behind, mark.start() in alone)
        whole = before if is_first else f"{whole}{before}"[-WINDOW:]  # of the sentence before the mention
        is_conditional = words.CONDITION.search(whole) and not (
            words.FORCED.search(whole) or words.CONCLUSION.search(before)
        )
        if is_conditional or words.TENTATIVE_BEFORE.search(before if is_first else clause):
            standing = min(standing, Standing.TENTATIVE)
        elif n:
            standing = _in_turn(standing, since, before, behind)
        if is_added:
            standing = min(standing, earlier)
        is_discussed = words.DISCUSSED_BEFORE.search(before) and standing is Standing.NAMED
        yield Mention(frozenset(letters if is_discussed else mark[1]), standing, is_added)


def _stated_alone(text: str, letters: str) -> set[int]:
    """Where an option stands alone: as a line, at the start or behind a question, and not as a label in a list."""
    lines = {match.start(1) - 1 for match in words.ALONE_LINE.finditer(text)}
    alone = lines | {match.start(match.lastindex) - 1 for match in words.ALONE.finditer(text)}
    listed: list[int] = []
    for label in words.LABEL.finditer(text):
        start = label.start(label.lastindex) - 1
        is_next = label[label.lastindex] == letters[len(listed) : len(listed) + 1]
        if not is_next or (listed and (start in lines) != (listed[-1] in lines)):
            break
        listed.append(start)
    return alone - set(listed) if len(listed) > 1 else alone


def _without_what_is_said_of_the_next(between: str) -> str:
    """What is said of the first of two mentions by the words between them, where no sentence ends."""
    patterns = (words.RULED_OUT_BEFORE, words.CHOSEN_BEFORE, words.FAVOURED_BEFORE)
    return between[: min((match.start() for pattern in patterns if (match := pattern.search(between))), default=None)]


def _standing(before: str, clause: str, behind: str, is_alone: bool) -> Standing:
    """What a sentence says of an option by the words before it, of which `clause` are the last, and behind it."""
    if words.SURPASSED_BEFORE.search(before) or words.SURPASSES_BEHIND.match(behind):
        return Standing.PREFERRED
    is_compared = words.COMPARED_BEFORE.search(clause) and words.COMPARED_BEHIND.match(behind)
    if is_compared or words.RULED_OUT_BEFORE.search(clause):
        return Standing.RULED_OUT
    verdict = _verdict(behind)
    if words.CHOSEN_BEFORE.search(before) or is_alone:
        is_wrong = verdict and verdict.lastgroup == "wrong" and verdict.start() <= 5
        standing = Standing.RULED_OUT if is_wrong else Standing.CHOSEN
    elif verdict:
        standings = {"wrong": Standing.RULED_OUT, "preferred": Standing.PREFERRED, "right": Standing.FAVOURED}
        standing = standings[verdict.lastgroup]
    elif words.FAVOURED_BEFORE.search(before) or (clause != before and _is_bare(clause, behind)):
        standing = Standing.PREFERRED if words.PREFERRED_BEFORE.search(clause) else Standing.FAVOURED
    else:
        standing = Standing.NAMED
    return min(standing, Standing.TENTATIVE) if words.TENTATIVE_BEHIND.match(behind) else standing


def _is_bare(before: str, behind: str) -> bool:
    """Whether an option stands alone between what is before and behind it."""
    return bool(words.LED_TO.fullmatch(before)) and not re.search(r"\w", behind)


def _verdict(behind: str) -> re.Match | None:
    """The first verdict behind an option, or after "but" the last one."""
    behind = words.OTHERS.split(behind)[0]
    verdicts = []
    for verdict in words.VERDICT.finditer(behind):
        *earlier, lead = words.CLAUSE_END.split(behind[: verdict.start()])
        if not earlier or _columns(lead) <= LEAD:  # otherwise the clause has a subject of its own
            verdicts.append(verdict)
    return verdicts[-1 if words.CONTRAST.search(behind) else 0] if verdicts else None


def _columns(text: str) -> int:
    return sum(1 + (unicodedata.east_asian_width(character) == "W") for character in text)


def _in_turn(standing: Standing, since: str, before: str, behind: str) -> Standing:
    """The standing of a mention that comes after others: a correction is a choice, and "but" a preference."""
    corrections = list(words.CORRECTION.finditer(since))
    if corrections and standing is not Standing.RULED_OUT:
        between = since[corrections[-1].end() :]
        if standing >= Standing.FAVOURED or _is_bare(before, behind) or words.FILL_OF_SENTENCES.fullmatch(between):
            return Standing.CHOSEN
    return Standing.PREFERRED if standing is Standing.FAVOURED and words.CONTRAST.search(before) else standing
