"""Exam questions: read from the columns of published sets, and asked in the same words in training and evaluation."""

import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Self

from medtune.errors import Unusable
from medtune.reading.dialects import KEYS_READ, QUESTIONS
from medtune.reading.exam_options import OPTION_LINE, options_of
from medtune.reading.keys import sort_keys
from medtune.reading.values import is_empty, text_of, with_values

# letter: the letter at once, as likelihoods are compared; tagged: thinking first, then <answer>X</answer>.
ExamFormat = Literal["letter", "tagged"]

SAME_OPTIONS = "broken exam question (same options)"
_NO_OPTIONS = "exam question without options"

_QUESTIONS = ("question", "problem", "问题", "题目", "题干")
# A letter or a number in MedQA and MedMCQA, beside which `answer` is the option's text.
_INDICES = ("answer_idx", "answer_index", "cop", "correct_option")
_ANSWERS = ("answer", "correct_answer", "答案", "正确答案")
_TURNS = ("messages", "conversations", "conversation")
_READ = frozenset((*QUESTIONS, *_QUESTIONS, *_ANSWERS))
_NUMBER = re.compile(r"\s*-?\d{1,2}(\.0)?\s*")
_SEVERAL = re.compile(r"[A-Z](?:[\s,;、/和]*[A-Z])*")
# That a record without options is an exam question too.
_EXAM_COLUMNS = ("exam_type", "exam_class", "exam_subject", "question_type", "choice_type", *_INDICES)
# An answer that says more than which option is right.
_SENTENCES = re.compile(r"[。,:!?\n]|\w[.;](\s|\Z)")
_MARKED_LETTER = re.compile(r"(?<![A-Za-z])([A-Z])(?:\s*[.:、)]|\s)")


@dataclass(slots=True)
class Exam:
    """A question with options.

    answer: the letter of the right option; several where several are right, "" where the record does not say.
    rest: the record's other keys.
    unanswered: the column and the number below 0 that say that there is no right answer, such as "cop -1".
    """

    question: str
    options: dict[str, str]
    answer: str
    rest: dict
    unanswered: str = ""

    def prompt(self, form: ExamFormat) -> str:
        return exam_prompt(self.question, self.options, form)

    def reply(self, form: ExamFormat) -> str:
        """The right answer in the form that the prompt asks for."""
        return f"<answer>{self.answer}</answer>" if form == "tagged" else self.answer

    def with_one_answer(self) -> Self:
        """Itself. Raises Unusable where several options are right, or two options are the same."""
        if len(self.answer) > 1:
            raise Unusable("several right answers", f"{self.answer}; only questions with one are used")
        first: dict[str, str] = {}
        for letter, text in self.options.items():
            if first.setdefault(text, letter) != letter:
                raise Unusable(SAME_OPTIONS, f"{first[text]} and {letter} are both {text!r:.60}")
        return self

    def refuse_unanswered(self) -> None:
        """Raise Unusable where the record says that there is no right answer."""
        if self.unanswered and not self.answer:
            advice = "such questions are the set's test part; take another part"
            raise Unusable(f"no right answer ({self.unanswered})", advice)

    def as_record(self, form: ExamFormat) -> dict:
        """The record as a question and its answer, which dialogues are made of."""
        answer = {"answer": self.reply(form)} if self.answer else {}
        return self.rest | {"question": self.prompt(form)} | answer


def exam_prompt(question: str, options: dict[str, str], form: ExamFormat = "letter") -> str:
    """The question with its options, where they do not stand in it already, and how to answer it, in its own
    language."""
    is_chinese = re.search("[\u4e00-\u9fff]", question) is not None
    stands = (re.search(rf"(?<![A-Za-z]){letter}\W*{re.escape(text)}", question) for letter, text in options.items())
    lines = [] if all(stands) else [f"{letter}. {text}" for letter, text in options.items()]
    return "\n".join([question, *lines, _INSTRUCTIONS[form, is_chinese]])


_INSTRUCTIONS: dict[tuple[ExamFormat, bool], str] = {
    ("letter", True): "请直接回答正确选项的字母。",
    ("letter", False): "Answer with the letter of the right option.",
    ("tagged", True): "请先思考，最后写出 <answer>X</answer>，其中 X 是正确选项的字母。",
    ("tagged", False): "Think first, then end with <answer>X</answer>, where X is the letter of the right option.",
}

# ---------------------------------------------------------------- reading


def has_options(record: object) -> bool:
    """Whether a record has something under a key that options stand under."""
    if not isinstance(record, dict):
        return False
    return any(not is_empty(record[key]) for key in sort_keys(tuple(record), ()).options)


def to_exam(record: object) -> Exam | None:
    """The exam question of a record; None for a record without a question in words or without options.

    Raises Unusable where the options or the answer cannot be read, and where an exam question has lost its options or
    its words.
    """
    if not isinstance(record, dict) or any(key in record for key in _TURNS):
        return None
    if not has_options(record):
        _refuse_lost_options(record)
        return None
    present = with_values(record)
    if (empty := _first_key(record, _QUESTIONS)) and _first_key(present, QUESTIONS) is None:
        raise Unusable("empty question", f"{empty!r} is empty beside options; write it or delete the record")
    question_key = _first_key(present, _QUESTIONS)
    option_keys = sort_keys(tuple(present), ()).options
    if question_key is None or not option_keys or not isinstance(present[question_key], str):
        return None
    options = {letter.strip().upper(): text for letter, text in options_of(present, option_keys).items()}
    if not options:
        raise Unusable(_NO_OPTIONS, f"{option_keys[0]!r} holds none; write them there")
    if len(options) < 2 or any(len(letter) > 1 for letter in options):
        raise Unusable(
            "broken exam question", f"its options are {', '.join(options)}; it needs two or more, by letters"
        )
    index_key, answer_key = _first_key(present, _INDICES), _first_key(present, _ANSWERS)
    answer_keys = [key for key in (index_key, answer_key) if key is not None]
    columns = (question_key, *option_keys, *answer_keys)
    below_0 = [key for key in answer_keys if _is_below_0(present[key]) and str(present[key]) not in options.values()]
    answer_keys = [key for key in answer_keys if key not in below_0]
    unanswered = " and ".join(f"{key} {present[key]}" for key in below_0)
    letters = {key: _letters(present[key], options, is_index=key == index_key) for key in answer_keys}
    named = set(filter(None, letters.values()))
    if answer_keys and len(named) != 1:
        stated = " and ".join(f"{key!r} is {present[key]!r:.60}" for key in answer_keys)
        fault = "keep the right one" if named else f"it must be one of {', '.join(options)}"
        if not named and any(_NUMBER.fullmatch(str(present[key])) for key in answer_keys):
            fault += ": numbers count from 0 or from 1, and those of the file do not show from which"
        raise Unusable("broken exam question", f"{stated}; {fault}")
    rest = {key: value for key, value in record.items() if key not in columns}
    question = text_of(present[question_key], f"{question_key!r}")
    if not question:
        raise Unusable("empty question", f"{question_key!r} is blank; write it or delete the record")
    return Exam(question, options, "".join(named), rest, unanswered)


def as_taught(record: object, form: ExamFormat) -> dict | None:
    """The record of an exam question as its prompt and the right answer, which dialogues are made of.

    None for any other record, and for a question whose answer is in sentences, which are then what is learned. Raises
    Unusable as `to_exam`, and where there is not one right answer.
    """
    if _is_explained(record) or (exam := to_exam(record)) is None:
        return None
    exam.refuse_unanswered()
    return exam.with_one_answer().as_record(form) if exam.answer else None


def _is_explained(record: object) -> bool:
    """Whether the answer to a question with options is in sentences."""
    key = _first_key(record, _ANSWERS) if has_options(record) else None
    if key is None or not isinstance(record[key], str):
        return False
    text = unicodedata.normalize("NFKC", record[key]).strip()
    options = options_of(record, sort_keys(tuple(record), ()).options).values()
    if record[key].strip() in options or _SEVERAL.fullmatch(text):
        return False
    mark = OPTION_LINE.match(text)
    return _SENTENCES.search(text, mark.end() if mark else 0) is not None


def _refuse_lost_options(record: dict) -> None:
    """Raise Unusable for an exam question whose answer names one of options that are nowhere, or under other names."""
    present = with_values(record)
    question_key = _first_key(present, _QUESTIONS)
    index_key = _first_key(present, _INDICES)
    answer_key = index_key or _first_key(present, _ANSWERS)
    if question_key is None or answer_key is None:
        return
    answer = unicodedata.normalize("NFKC", str(present[answer_key])).strip().upper()
    names_option = _SEVERAL.fullmatch(answer) or (index_key and _NUMBER.fullmatch(answer))
    marked = _MARKED_LETTER.findall(unicodedata.normalize("NFKC", str(present[question_key])))
    if not names_option or {"A", "B"} <= set(marked):
        return
    if _first_key(record, _EXAM_COLUMNS) or sort_keys(tuple(record), ()).options:
        raise Unusable(_NO_OPTIONS, f"{answer_key!r} is {answer}, and no options are there; add 'options'")
    if keys := _keys_like_options(present):
        listed = ", ".join(map(repr, keys))
        advice = f"write them as 'options', or take {listed} out of the record if that is something else"
        raise Unusable(_NO_OPTIONS, f"{answer_key!r} is {answer}, and the options seem to be in {listed}: {advice}")


def _keys_like_options(record: dict) -> list[str]:
    """Unknown keys that hold several texts, or are numbered."""
    unknown = [key for key in sort_keys(tuple(record), KEYS_READ).unknown if key.strip().lower() not in _READ]
    lists = [key for key in unknown if isinstance(record[key], dict | list) and len(record[key]) > 1]
    numbered = [key for key in unknown if key.strip()[-1:].isdigit() and isinstance(record[key], str)]
    return lists or (numbered if len(numbered) > 1 else [])


def _first_key(record: dict, names: Iterable[str]) -> str | None:
    """The first of the names that is a key, in whatever case."""
    by_lower_case = {key.strip().lower(): key for key in record}
    return next((name if name in record else by_lower_case[name] for name in names if name in by_lower_case), None)


def _is_below_0(answer: object) -> bool:
    return _NUMBER.fullmatch(str(answer)) is not None and float(str(answer)) < 0


def _letters(answer: object, options: dict[str, str], is_index: bool) -> str:
    """The letters of the options that an answer names, by letter or, unless `is_index`, by words; "" for none.

    Several letters come in the order of the options.
    """
    if isinstance(answer, list):
        answer = ",".join(map(str, answer))
    answer = str(answer).strip()
    by_words = {letter for letter, words in options.items() if words == answer and not is_index}
    text = unicodedata.normalize("NFKC", answer)
    line = OPTION_LINE.match(text)
    letter, words = ((line[1] or line[2]).upper(), text[line.end() :]) if line else (text.upper(), "")
    if letter in options and words in ("", options[letter]):
        named = by_words | {letter}
        return letter if len(named) == 1 else ""
    if not by_words and _SEVERAL.fullmatch(text):
        named = set(re.findall("[A-Z]", text))
        return "".join(letter for letter in options if letter in named) if named <= options.keys() else ""
    return "".join(by_words) if len(by_words) == 1 else ""


# ---------------------------------------------------------------- answers that are numbers


def with_answer_letters(
    rows: Iterable[tuple[str, object]], read_again: Callable[[], Iterable[tuple[str, object]]]
) -> Iterator[tuple[str, object]]:
    """The records of a file, answers to exam questions that are numbers (MedMCQA's `cop`) as letters.

    Numbers count from 0 or from 1, as the file shows: only the first kind has a 0, only the second the number of
    options. One below 0 is no answer.

    read_again: gives the rows once more.
    """
    starts: dict[str, int | None] = {}
    for source, record in rows:
        for key, number, n_options in _numbers(record):
            if key not in starts:
                starts[key] = _start_of(key, read_again())
            if starts[key] is not None and 0 <= number - starts[key] < n_options:
                record = record | {key: string.ascii_uppercase[number - starts[key]]}
        yield source, record


def _start_of(key: str, rows: Iterable[tuple[str, object]]) -> int | None:
    """Whether the numbers under a key count from 0 or from 1; None if no record shows it."""
    numbers = (found for _, record in rows for found in _numbers(record) if found[0] == key)
    return next((int(number > 0) for _, number, n_options in numbers if number in (0, n_options)), None)


def _numbers(record: object) -> list[tuple[str, int, int]]:
    """Key, number and how many options there are, for each answer of an exam question that is a number."""
    if not has_options(record):
        return []
    keys = filter(None, (_first_key(record, names) for names in (_INDICES, _ANSWERS)))
    numbers = {key: str(record[key]) for key in keys if _NUMBER.fullmatch(str(record[key]))}
    try:
        words = options_of(record, sort_keys(tuple(record), ()).options).values() if numbers else ()
    except Unusable:
        return []
    # 15 may be an option's words.
    return [(key, int(float(number)), len(words)) for key, number in numbers.items() if number.strip() not in words]
