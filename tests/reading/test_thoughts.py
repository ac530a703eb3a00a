"""A reply's thought and its answer, whole and while it is written."""

import pytest

from medtune.reading.thoughts import ReplySplitter, opens_thought, split_reply

REPLIES = [
    ("拨打120。", "", "拨打120。"),
    ("", "", ""),
    ("<think>\n先想想。\n</think>\n\n拨打120。", "先想想。", "拨打120。"),
    ("<think>\n\n</think>\n\n拨打120。", "", "拨打120。"),
    ("<thinking>甲</thinking>乙", "甲", "乙"),
    ("## Thinking\n\n甲\n\n## Final Response\n\n乙", "甲", "乙"),
    ("**Note**\n## Thinking\n乙", "", "**Note**\n## Thinking\n乙"),
    ("<think>甲</think>乙<think>丙</think>丁", "甲\n\n丙", "乙\n\n丁"),
    ("血氧 <90% 时就诊", "", "血氧 <90% 时就诊"),
]


@pytest.mark.parametrize(("reply", "thought", "answer"), REPLIES)
def test_the_answer_is_what_stands_behind_the_thought(reply, thought, answer):
    assert split_reply(reply) == (thought, answer, True)


@pytest.mark.parametrize(
    ("reply", "opened", "parts"),
    [
        ("<think>应拨打120", False, ("应拨打120", "", False)),
        ("## Thinking\n\n甲", False, ("甲", "", False)),
        ("乙<think>丙", False, ("丙", "乙", False)),
        ("应拨打120", True, ("应拨打120", "", False)),
        ("甲</think>乙", True, ("甲", "乙", True)),
        ("<think>甲</think>乙", True, ("甲", "乙", True)),
        ("甲</think>乙", False, ("甲", "乙", True)),
        ("<think>甲<think>乙</think>丙</think>丁", False, ("甲\n\n乙\n\n丙", "丁", True)),
    ],
)
def test_a_thought_that_is_open_at_an_end_or_opened_by_the_prompt(reply, opened, parts):
    assert split_reply(reply, opened) == parts


@pytest.mark.parametrize(("reply", "thought", "answer"), REPLIES)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_stream_tells_the_parts_of_the_whole_reply(reply, thought, answer, size):
    splitter = ReplySplitter()
    news = [splitter.add(reply[start : start + size]) for start in range(0, len(reply), size)]
    assert tuple(map("".join, zip(*news, splitter.end(), strict=True))) == (thought, answer)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_stream_of_a_reply_that_begins_inside_its_thought(size):
    reply = "先想 <想。\n</think>\n\n拨打120。"
    splitter = ReplySplitter(opened=True)
    news = [splitter.add(reply[start : start + size]) for start in range(0, len(reply), size)]
    assert tuple(map("".join, zip(*news, splitter.end(), strict=True))) == ("先想 <想。", "拨打120。")


def test_a_stream_never_takes_back_what_it_told():
    splitter = ReplySplitter()
    news = [splitter.add(piece) for piece in ("先想", "。</think>", "多喝水")]
    assert news == [("", "先想"), ("。", ""), ("", "多喝水")]
    assert splitter.end() == ("", "")


@pytest.mark.parametrize(
    ("prompt", "opens"),
    [("<|Assistant|><think>\n", True), ("<think>\n\n</think>\n\n", False), ("assistant\n", False)],
)
def test_a_prompt_that_opens_a_thought(prompt, opens):
    assert opens_thought(prompt) is opens
