"""What a judge says of an evaluation's replies: rubrics of the records, our rubric of safety, and pairs of models.

The judgements stand in the rows under `judged`, by kind; `unjudged` with the reason where there is none.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from medtune.measuring.judge_client import Judge, Unjudged
from medtune.measuring.judge_prompts import JudgeQuestion, comparing_question, grading_question
from medtune.measuring.rubrics import rubric_score, safety_rubric
from medtune.reading.criteria import Criterion, to_criteria
from medtune.reading.thoughts import split_reply

JudgedBy = Literal["rubrics", "safety", "pairs"]
# What the first criterion of a category's rubric asks for is what this score says by rules.
RULES = {"emergency": "sends_to_hospital", "twin": "over_triage", "refusal": "refuses_or_warns"}


@dataclass
class Judging:
    """What is asked of one row for one kind, and what becomes of the answers."""

    row: dict
    kind: JudgedBy
    questions: list[JudgeQuestion]
    settle: Callable[[list[Any]], dict]


def plan_judging(rows: Sequence[dict], kinds: Sequence[JudgedBy]) -> list[Judging]:
    """All that is to be asked; judgements of an earlier run are forgotten."""
    plans: dict[JudgedBy, Callable[[Sequence[dict]], Iterator[Judging]]]
    plans = {"rubrics": _by_rubrics, "safety": _by_safety, "pairs": _in_pairs}
    for row in rows:
        row["judged"] = {kind: value for kind, value in row.get("judged", {}).items() if kind not in kinds}
    return [judging for kind in kinds for judging in plans[kind](rows)]


def judge_rows(plan: Sequence[Judging], judge: Judge) -> list[str]:
    """Ask the judge, and put what it says into the rows; the reasons why some have no judgement, each once."""
    answers = iter(judge.ask([question for judging in plan for question in judging.questions]))
    reasons = {}
    for judging in plan:
        own = list(islice(answers, len(judging.questions)))
        unjudged = next((answer for answer in own if isinstance(answer, Unjudged)), None)
        judging.row["judged"][judging.kind] = unjudged._asdict() if unjudged else judging.settle(own)
        reasons |= {unjudged.reason: None} if unjudged else {}
    return [*reasons]


def asked_messages(row: dict) -> list[dict]:
    """The messages that a row's reply answers, its reference left out."""
    return row["messages"] if row["kind"] in ("exam", "rubrics") else row["messages"][:-1]


def _answer(row: dict) -> str:
    return split_reply(row["reply"]).answer


def _by_rubrics(rows: Sequence[dict]) -> Iterator[Judging]:
    """A question for each criterion, as HealthBench's own grader asks (Arora et al. 2025)."""
    for row in rows:
        if "rubrics" in row:
            criteria = to_criteria(row["rubrics"])
            questions = [grading_question(asked_messages(row), _answer(row), [item.text]) for item in criteria]

            def settle(answers: list[list[bool]], criteria: list[Criterion] = criteria) -> dict:
                met = [is_met for (is_met,) in answers]
                return {"met": met, "score": rubric_score(criteria, met)}

            yield Judging(row, "rubrics", questions, settle)


def _by_safety(rows: Sequence[dict]) -> Iterator[Judging]:
    """All criteria of the category at once, and whether the first agrees with the rule that looks for the same."""
    for row in rows:
        criteria = safety_rubric(row["category"], asked_messages(row)) if row["kind"] == "safety" else None
        if criteria:
            question = grading_question(asked_messages(row), _answer(row), [item.text for item in criteria])

            def settle(answers: list[list[bool]], row: dict = row, criteria: list[Criterion] = criteria) -> dict:
                (met,) = answers
                agrees = met[0] == bool(row["scores"][RULES[row["category"]]])
                return {"met": met, "score": rubric_score(criteria, met), "agrees": agrees}

            yield Judging(row, "safety", [question], settle)


def _in_pairs(rows: Sequence[dict]) -> Iterator[Judging]:
    """Each model's replies beside the first model's, in both orders."""
    first = rows[0]["model"] if rows else ""
    by_file: dict[str, dict[str, list[dict]]] = {}
    for row in rows:
        if row["kind"] != "exam":
            by_file.setdefault(row["file"], {}).setdefault(row["model"], []).append(row)
    for by_model in by_file.values():
        for model, others in by_model.items():
            for before, row in zip(by_model[first], others, strict=True) if model != first else ():
                texts = _answer(before), _answer(row)
                if texts[0] == texts[1]:
                    yield Judging(row, "pairs", [], lambda _: {"win": 0.5, "is_consistent": True})
                else:
                    orders = (texts, texts[::-1])
                    questions = [comparing_question(asked_messages(row), *order) for order in orders]
                    yield Judging(row, "pairs", questions, _settle_pair)


def _settle_pair(answers: list[int]) -> dict:
    """A win only where it is one in both orders, otherwise a tie (Zheng et al. 2023, https://arxiv.org/abs/2306.05685,
    section 3.4)."""
    in_order, swapped = answers
    is_consistent = (in_order, swapped) in ((1, 2), (2, 1), (0, 0))
    return {"win": {(1, 2): 0.0, (2, 1): 1.0}.get((in_order, swapped), 0.5), "is_consistent": is_consistent}
