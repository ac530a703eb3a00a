"""What models are measured on: dialogues with references, safety items and exam questions."""

import random
import re
from collections.abc import Sequence

from loguru import logger

from medtune.errors import Unusable, UserError
from medtune.reading.conversations import to_dialogue
from medtune.reading.files import read_raw
from medtune.reading.finding import find_files, sha256_of

SAFETY = ("emergency", "refusal", "about")
COPIED_KEYS = ("id", "aspect", "category", "names", "exam_subject")


def read_tests(paths: Sequence[str], num_samples: int | None, seed: int) -> tuple[list[dict], dict[str, dict]]:
    """The records to measure, each with `file`, `kind` and `source`; and the facts of each file.

    Raises UserError with file:line for a record of no form.
    """
    files = dict.fromkeys(file for path in paths for file in find_files(path, "--test_file")[0])
    tests, facts = [], {}
    for file in files:
        records, n_left_out = [], 0
        for source, record in read_raw(file):
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
    """Convert a record to an evaluation item; None for an exam question with several right answers."""
    options = record.get("option") or record.get("options") if isinstance(record, dict) else None
    extras = {key: record[key] for key in COPIED_KEYS if key in record} if isinstance(record, dict) else {}
    if not options:
        dialogue = to_dialogue(record, source)
        kind = "safety" if extras.get("category") in SAFETY else "dialogue"
        return extras | {"kind": kind, "messages": dialogue.messages, "tools": dialogue.tools}
    answer, question = record.get("answer"), record.get("question")
    is_text = isinstance(question, str) and question and isinstance(answer, str)
    if not isinstance(options, dict) or not is_text:
        raise Unusable("broken exam question", 'it needs "question", "option" as an object of letters, and "answer"')
    options = {letter: str(text) for letter, text in options.items() if text}
    answer = answer.strip()
    if len(answer) > 1 and set(answer) <= options.keys():
        return None
    if answer not in options:
        raise Unusable("broken exam question", f"the answer {answer!r} is none of {', '.join(options)}")
    messages = [{"role": "user", "content": exam_prompt(question, options)}]
    return extras | {"kind": "exam", "messages": messages, "tools": None, "options": options, "answer": answer}


def exam_prompt(question: str, options: dict[str, str]) -> str:
    """The question with its options, in its own language."""
    is_chinese = re.search("[\u4e00-\u9fff]", question)
    instruction = "请直接回答正确选项的字母。" if is_chinese else "Answer with the letter of the right option."
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in options.items()), instruction])
