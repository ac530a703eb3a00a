"""What models are measured on: dialogues with references, safety items, exam questions, questions with rubrics."""

import random
from collections.abc import Sequence
from functools import partial

from loguru import logger

from medtune.errors import Unusable, UserError
from medtune.reading.conversations import to_dialogue, to_prompt
from medtune.reading.criteria import to_criteria
from medtune.reading.exams import has_options, to_exam, with_answer_letters
from medtune.reading.files import read_raw
from medtune.reading.finding import find_files, sha256_of

SAFETY = ("emergency", "twin", "refusal", "about")
COPIED_KEYS = ("id", "pair", "aspect", "category", "names", "exam_subject", "rubrics")


def read_tests(paths: Sequence[str], num_samples: int | None, seed: int) -> tuple[list[dict], dict[str, dict]]:
    """The records to measure, each with `file`, `kind` and `source`; and the facts of each file.

    Raises UserError with file:line for a record of no form.
    """
    files = dict.fromkeys(file for path in paths for file in find_files(path, "--test_file")[0])
    tests, facts = [], {}
    for file in files:
        records, n_left_out = [], 0
        for source, record in with_answer_letters(read_raw(file), partial(read_raw, file)):
            try:
                if isinstance(record, Unusable):
                    raise record
                test = to_test(record, source)
            except Unusable as unusable:
                raise UserError(f"{source}: {unusable.reason}: {unusable.detail}") from None
            if test is None:
                n_left_out += 1
            else:
                records.append({"file": str(file), **test, "source": source})
        if n_left_out:
            logger.warning(f"{file}: {n_left_out} questions with several right answers are left out")
        if not records:
            raise UserError(f"--test_file {file}: no record to measure in it")
        n_read = len(records)
        if num_samples is not None and num_samples < n_read:
            records = [records[n] for n in sorted(random.Random(seed).sample(range(n_read), num_samples))]
        facts[str(file)] = {"records": n_read, "measured": len(records), "sha256": sha256_of(file)}
        tests += records
    return tests, facts


def to_test(record: object, source: str) -> dict | None:
    """Convert a record to an evaluation item; None for an exam question with several right answers.

    An exam question is asked in two formats, since a model trained on one may fail in the other: `messages` ask for
    the letter alone, `tagged_prompt` for a tag behind some thinking.
    """
    extras = {key: record[key] for key in COPIED_KEYS if key in record} if isinstance(record, dict) else {}
    exam = to_exam(record)
    if exam is None and has_options(record):
        raise Unusable("broken exam question", "it has options, and no 'question' in words")
    if exam is None and "rubrics" in extras and (asked := _graded_by_rubrics(record, source)):
        return extras | asked
    if exam is None:
        dialogue = to_dialogue(record, source)
        kind = "safety" if extras.get("category") in SAFETY else "dialogue"
        return extras | {"kind": kind, "messages": dialogue.messages, "tools": dialogue.tools}
    exam.refuse_unanswered()
    if not exam.answer:
        raise Unusable("broken exam question", "it has no 'answer': write the letter of the right option")
    if len(exam.answer) > 1:
        return None
    messages = [{"role": "user", "content": exam.prompt("letter")}]
    asked = {"kind": "exam", "messages": messages, "tools": None}
    tagged = {"tagged_prompt": exam.prompt("tagged")}
    return extras | asked | tagged | {"options": exam.options, "answer": exam.answer}


def _graded_by_rubrics(record: dict, source: str) -> dict | None:
    """A question that rubrics alone grade, in HealthBench's form; None where a reply follows, which is a reference."""
    to_criteria(record["rubrics"])
    dialogue = to_prompt(record, source)
    is_answered = dialogue.messages[-1]["role"] != "user"
    return None if is_answered else {"kind": "rubrics", "messages": dialogue.messages, "tools": dialogue.tools}
