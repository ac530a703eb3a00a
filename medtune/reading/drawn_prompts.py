"""Prompts drawn from dialogues and exam questions, for a model to reply to."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from medtune.errors import Unusable
from medtune.reading.criteria import to_criteria
from medtune.reading.exams import ExamFormat
from medtune.reading.finding import RecordFile
from medtune.reading.keys import Reading
from medtune.reading.readers import read_dialogues, read_questions
from medtune.reading.records import BadRecord, Dialogue, Pair, Prompt, Question, Report
from medtune.reading.thoughts import split_reply


def draw_prompts(
    files: Sequence[RecordFile],
    num_samples: int,
    seed: int,
    reading: Reading | None = None,
    as_questions: ExamFormat | None = None,
    show_progress: Callable[[Iterator], Iterable] = iter,
) -> tuple[list[Pair | Prompt], Report]:
    """Sample `num_samples` dialogues uniformly, in their order, as pairs without a rejected reply yet.

    Only the sample is in memory (reservoir sampling, Vitter 1985).

    as_questions: as prompts alone, exam questions in this form.
    """
    report, rng = Report(), random.Random(seed)
    drawn: list[tuple[int, Pair | Prompt]] = []
    n_usable = 0
    read, make = (
        (read_questions, partial(_of_question, form=as_questions)) if as_questions else (read_dialogues, _of_dialogue)
    )
    for dialogue in report.usable(show_progress(read(files, reading))):
        try:
            prompt = make(dialogue)
        except Unusable as error:
            report.drop(BadRecord(dialogue.source, error.reason, error.detail))
            continue
        n_usable += 1
        place = len(drawn) if len(drawn) < num_samples else rng.randrange(n_usable)
        if place < num_samples:
            drawn[place : place + 1] = [(n_usable, prompt)]
    return [prompt for _, prompt in sorted(drawn, key=lambda numbered: numbered[0])], report


def _of_question(question: Question, form: ExamFormat) -> Prompt:
    """The last question of a record that ends with one, otherwise that of the longest reply; raises Unusable."""
    if "rubrics" in question.rest:
        to_criteria(question.rest["rubrics"])
    if question.exam is not None:
        question.exam.refuse_unanswered()
        exam = question.exam.with_one_answer()
        asked = question.messages[: -1 if question.messages[-1]["role"] == "assistant" else None]
        messages = [*asked[:-1], {"role": "user", "content": exam.prompt(form)}]
        return Prompt(messages, None, exam.reply(form), question.source, exam, question.rest)
    if question.messages[-1]["role"] == "user" and not question.tools:
        return Prompt(question.messages, None, "", question.source, rest=question.rest)
    pair = _of_dialogue(question)
    return Prompt(pair.messages, None, pair.chosen, pair.source, rest=question.rest)


def _of_dialogue(dialogue: Dialogue) -> Pair:
    """A pair of the turns up to the longest reply and, as chosen, that reply; raises Unusable."""
    messages = dialogue.messages
    if dialogue.tools or any(message.get("tool_calls") for message in messages):
        raise Unusable("uses tools", "pairs are made of dialogues without tools")
    replies = [n for n, message in enumerate(messages) if message["role"] == "assistant" and "weight" not in message]
    # The last turn is often a mere "you are welcome".
    longest = max(replies, key=lambda index: len(split_reply(messages[index]["content"]).answer))
    if not split_reply(messages[longest]["content"]).answer:
        raise Unusable("no answer", "its replies are thoughts alone")
    return Pair(messages[:longest], messages[longest]["content"], "", None, dialogue.source)
