"""The letter that a reply to an exam question commits to."""

import json
from pathlib import Path

import pytest

from medtune.measuring.answers import written_letter
from medtune.reading.thoughts import split_reply

# Written by hand, with the letter that a careful reader would mark; null where the reply chooses none or several.
REPLIES = [json.loads(line) for line in Path(__file__).with_name("exam_replies.jsonl").read_text("utf-8").splitlines()]


def letter_of(reply: str, words: list[str]) -> str | None:
    return written_letter(split_reply(reply).answer, dict(zip("ABCDEFGHIJ", words, strict=False)))


def test_98_of_100_replies_are_read_as_a_careful_reader_would():
    read = [(row["reply"], letter_of(row["reply"], row["options"]), row["letter"]) for row in REPLIES]
    wrong = [(reply, letter) for reply, letter, right in read if letter != right]
    assert len(REPLIES) >= 200
    assert len(wrong) <= 0.02 * len(REPLIES), wrong


def test_no_letter_is_taken_from_a_thought():
    """Whatever a thought says, the letter is that of the answer alone."""
    replies = [row for row in REPLIES if split_reply(row["reply"]).thought == ""]
    for row in replies:
        for thought in ("答案是A。选A。", "The answer is B.", "\\boxed{D} <answer>D</answer>"):
            thinking = f"<think>\n{thought}\n</think>\n\n{row['reply']}"
            assert letter_of(thinking, row["options"]) == letter_of(row["reply"], row["options"])
            assert letter_of(f"<think>\n{thought}", row["options"]) is None


@pytest.mark.parametrize("words", ["应选用", "应该选项", "答案是", ", therefore", "is the ", "A不对，", "更", "\n"])
def test_a_reply_that_repeats_itself_is_read_in_no_time(words):
    """Patterns that match a text in many ways would take longer than the universe has."""
    assert letter_of(words * 1000 + "。答案是B", ["感冒", "痛风"]) == "B"


@pytest.mark.parametrize(
    ("reply", "letter"), [("B", "B"), ("感冒或痛风", None), ("An apple", None), ("I think so", None), ("", None)]
)
def test_two_options(reply, letter):
    assert letter_of(reply, ["感冒", "痛风"]) == letter
