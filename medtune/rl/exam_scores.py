"""Exam accuracy in the evaluations of PPO and GRPO: the figure that scripts/evaluate_model.py has for these replies."""

import json
from collections.abc import Sequence

from medtune.measuring.answers import written_letter
from medtune.measuring.intervals import wilson_interval
from medtune.reading.exams import ExamFormat
from medtune.rl.rewards import JUDGE, REWARD_MODEL, Rewards
from medtune.rl.scored_replies import ScoredReply

# By --exam_format, what scripts/evaluate_model.py calls accuracy and replies without a letter.
_FIGURES = {
    "letter": ("exam_accuracy_written", "exam_unparsed"),
    "tagged": ("exam_accuracy_tagged", "exam_unparsed_tagged"),
}


def exam_scores(reply: ScoredReply, form: ExamFormat) -> dict[str, float]:
    """Whether a reply concludes with the right letter, by the evaluation's lenient reader, and whether with none, each
    0 or 1; {} where the prompt is no exam question with a known answer."""
    if not _is_exam(reply.record):
        return {}
    accuracy, unparsed = _FIGURES[form]
    letter = written_letter(reply.parts.answer, reply.record["options"])
    return {accuracy: float(letter == reply.record["answer"]), unparsed: float(letter is None)}


def mean_scores(scores: Sequence[dict[str, float]], form: ExamFormat) -> dict[str, float]:
    """The means of replies' scores by name, each over the replies that have it; with exam accuracy among them its 95 %
    interval."""
    names = dict.fromkeys(name for of_reply in scores for name in of_reply)
    columns = {name: [of_reply[name] for of_reply in scores if name in of_reply] for name in names}
    means = {name: sum(values) / len(values) for name, values in columns.items()}
    if right := columns.get(_FIGURES[form][0]):
        means["exam_low"], means["exam_high"] = wilson_interval(sum(right), len(right))
    return means


def chosen_by_exam(eval_rows: Sequence[dict], rewards: Rewards, form: ExamFormat) -> str | None:
    """The name of exam accuracy where it chooses checkpoint-best: where held-out prompts are exam questions, unless a
    reward model or a judge scores the replies and `exam` does not."""
    if not any(_is_exam(json.loads(row["record"])) for row in eval_rows):
        return None
    return _FIGURES[form][0] if "exam" in rewards.names or not {REWARD_MODEL, JUDGE} & {*rewards.names} else None


def _is_exam(record: dict) -> bool:
    return bool(record.get("options") and record.get("answer"))
