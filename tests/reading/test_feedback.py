"""Replies with a label, for KTO: dialogues of any dialect, whose verdict is what is learned."""

import pytest
from datasets import Dataset
from reading_cases import assistant, gpt, human, user

from medtune.errors import UserError
from medtune.reading.encoders import with_mismatched_replies
from medtune.reading.keys import Reading
from medtune.reading.readers import load_records, read_feedback, read_pairs
from medtune.reading.records import Feedback

TURNS = [user("头疼"), assistant("休息")]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": TURNS},
        {"conversations": [human("头疼"), gpt("休息")]},
        {"instruction": "头疼", "input": "", "output": "休息"},
        {"question": "头疼", "answer": "休息"},
        {"prompt": "头疼", "completion": "休息"},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
    ],
    ids=str,
)
@pytest.mark.parametrize("key", ["label", "kto_tag"])
@pytest.mark.parametrize(
    ("value", "is_desirable"), [(True, True), (False, False), ("false", False), (1, True), (0, False)]
)
def test_every_dialect_with_a_label(write_jsonl, record, key, value, is_desirable):
    path = write_jsonl("d.jsonl", [record | {key: value}])
    (feedback,) = read_feedback([path])
    assert feedback == Feedback(TURNS[:1], "休息", is_desirable, f"{path}:1")


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ({"messages": TURNS}, "no label: it has no 'label' or 'kto_tag' with true for a good reply"),
        ({"messages": TURNS, "label": None}, "no label: "),
        ({"messages": TURNS, "label": "内科"}, "unclear label: 'label' is '内科', which is neither true nor false"),
        ({"messages": TURNS, "label": 0.5}, "unclear label: 'label' is 0.5"),
        ({"messages": TURNS, "label": True, "kto_tag": False}, "unclear label: 'label' and 'kto_tag' contradict"),
        ({"messages": TURNS, "label": True, "is_correct": False}, "not to be learned: 'is_correct' is False"),
        ({"messages": TURNS[:1], "label": True}, "no reply: "),
        ({"messages": [TURNS[0], TURNS[1] | {"weight": 0}, *TURNS], "label": True}, ""),
    ],
    ids=lambda value: value[:14] if isinstance(value, str) else "",
)
def test_bad_feedback_is_named_in_one_line(write_jsonl, record, fault):
    path = write_jsonl("d.jsonl", [record])
    if not fault:  # earlier replies are read and not learned
        assert load_records(read_feedback, [path])[0][0].reply == "休息"
        return
    (found,) = read_feedback([path])
    assert str(found).startswith(f"{path}:1: {fault}")
    with pytest.raises(UserError, match="1 of 1 records are bad"):
        load_records(read_feedback, [path])


PAIR = {"response_chosen": "休息", "response_rejected": "不用管。"}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": TURNS, "label": True},
        {"conversations": TURNS, "kto_tag": "false"},
        {"prompt": "头疼", "completion": "休息", "label": 0, "rejected": None},
        {"question": "头疼", "answer": "", "label": "True"},
    ],
    ids=str,
)
def test_single_replies_where_pairs_are_read(write_jsonl, record):
    (bad,) = read_pairs([write_jsonl("d.jsonl", [record])])
    assert bad.reason == "single reply"
    assert "one reply with a label where a pair has two; dpo_training.py --loss_type kto learns from" in bad.detail


@pytest.mark.parametrize(
    "record", [{"question": "头疼", **PAIR}, {"messages": TURNS[:1], "chosen": "休息", "rejected": "喝酒", "label": 1}]
)
def test_pairs_where_single_replies_are_read(write_jsonl, record):
    (bad,) = read_feedback([write_jsonl("d.jsonl", [record])])
    assert bad.reason == "preference pair"
    assert bad.detail.endswith("leave out --loss_type, or give one for pairs: sigmoid")


def test_a_topic_of_a_dialogue_is_no_label_of_a_single_reply(write_jsonl):
    (bad,) = read_pairs([write_jsonl("d.jsonl", [{"messages": TURNS, "label": "内科"}])])
    assert bad.reason == "no pair"


def test_a_topic_under_the_name_of_the_label_can_be_ignored(write_jsonl):
    path = write_jsonl("d.jsonl", [{"messages": TURNS, "label": "内科", "kto_tag": False}])
    (feedback,) = read_feedback([path], Reading(("label",)))
    assert feedback.is_desirable is False


def test_mismatched_replies_are_to_other_prompts():
    prompts = [[1], [1], [2], [3], [3]]
    rows = [
        {"prompt_ids": prompt, "reply_ids": [10 + index] * (index + 1), "length": 0, "source": ""}
        for index, prompt in enumerate(prompts)
    ]
    dataset = with_mismatched_replies(Dataset.from_list(rows))
    assert [ids[0] - 10 for ids in dataset["mismatched_ids"]] == [2, 2, 3, 0, 0]
    assert dataset["length"][:] == [4, 4, 5, 5, 6]
