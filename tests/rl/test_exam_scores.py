"""Exam accuracy of an evaluation of PPO and GRPO: what scripts/evaluate_model.py has for the same replies."""

import json

import pytest

from medtune.measuring.figures import score, summarize_scores
from medtune.rl.arguments import RewardArguments
from medtune.rl.exam_scores import chosen_by_exam, exam_scores, mean_scores
from medtune.rl.rewards import ScoredReply, load_rewards

EXAM = {"answer": "B", "options": {"A": "多喝水", "B": "请就诊", "C": "不用管"}}
TEXTS = ["答案：B", "我选 A。", "请就诊", "说不清", "<think>应该是 A</think>答案为 B", "<think>应该是 B", "B"]


def reply_of(text: str, record: dict = EXAM) -> ScoredReply:
    return ScoredReply(text, 5, True, [{"role": "user", "content": "哪个？"}], record)


@pytest.mark.parametrize(("form", "name"), [("letter", "exam_accuracy_written"), ("tagged", "exam_accuracy_tagged")])
def test_figures_and_interval_are_those_of_the_evaluation(form, name):
    means = mean_scores([exam_scores(reply_of(text), form) for text in TEXTS], form)
    rows = []
    for text in TEXTS:
        replies = {"reply": text, "tagged_reply": text, "thought_tokens": 0, "tagged_thought_tokens": 0}
        scores = score(EXAM | replies | {"kind": "exam", "ended": True, "letter_logps": {}})
        rows.append({"reply": text, "scores": scores})
    summary = summarize_scores(rows)
    assert means[name] == pytest.approx(summary[name]["value"], abs=1e-4) == pytest.approx(4 / 7, abs=1e-4)
    interval = [means["exam_low"], means["exam_high"]]
    assert interval == pytest.approx(summary[name]["interval"], abs=1e-4)
    unparsed = name.replace("accuracy", "unparsed").removesuffix("_written")
    assert means[unparsed] == pytest.approx(summary[unparsed]["value"], abs=1e-4) == pytest.approx(2 / 7, abs=1e-4)


def test_means_are_over_the_replies_that_have_a_score():
    dialogue = {"reference": "就诊。"}
    assert exam_scores(reply_of("B", dialogue), "tagged") == {}
    scores = [{"reward": 1.0} | exam_scores(reply_of("B", record), "tagged") for record in (EXAM, dialogue)]
    means = mean_scores([*scores, {"reward": 4.0}], "tagged")
    assert (means["reward"], means["exam_accuracy_tagged"]) == (2.0, 1.0)
    assert mean_scores([{"reward": 1.0}], "tagged") == {"reward": 1.0}
    assert mean_scores([{}, {}], "tagged") == {}


@pytest.mark.parametrize(
    ("names", "records", "chosen"),
    [
        (["exam"], [EXAM], "exam_accuracy_tagged"),
        (["exam", "reward_model"], [{"reference": "就诊。"}, EXAM], "exam_accuracy_tagged"),
        (["format"], [EXAM], "exam_accuracy_tagged"),
        (["reward_model"], [EXAM], None),
        (["format"], [{"reference": "就诊。"}], None),
        (["exam"], [], None),
    ],
)
def test_what_chooses_the_best_checkpoint(names, records, chosen):
    path = "rm" if "reward_model" in names else None
    rewards = load_rewards(RewardArguments(rewards=names, reward_model_path=path), 8)
    rows = [{"record": json.dumps(record)} for record in records]
    assert chosen_by_exam(rows, rewards, "tagged") == chosen
