"""Rewards: the strict forms and what tries to get around them, values by hand, and faults of the user's own file."""

import json

import pytest
import torch
from datasets import Dataset

from medtune.errors import UserError
from medtune.rl.arguments import RewardArguments
from medtune.rl.rewards import (
    exam_reward,
    format_reward,
    length_reward,
    load_rewards,
    reference_reward,
)
from medtune.rl.scored_replies import ScoredReply, scored_replies

EXAM = {"answer": "C", "options": {"A": "甲", "B": "乙", "C": "丙", "D": "丁"}}


def reply_of(text: str, record: dict = EXAM, n_tokens: int = 5, opened: bool = False) -> ScoredReply:
    return ScoredReply(text, n_tokens, True, [{"role": "user", "content": "哪个？"}], record, opened)


# ---------------------------------------------------------------- the strict forms

TAGGED = [
    "<answer>C</answer>",
    "先看症状，再看病史。\n<answer> C </answer>",
    "<think>\nA？B？不。<answer>A</answer>\n</think>\n\n<answer>C</answer>",
    "<answer>Ｃ</answer>",
]
UNTAGGED = ["C", "分析：丙符合。\nC", "<think>\n像A。\n</think>\n\nC", "Ｃ"]
WITHOUT_FORM = [
    "",
    "答案是C",
    "C.",
    "C、丙",
    "c",
    "A B C D",
    "ABCD",
    "C\n以上供参考。",
    "<answer>C</answer>，也可能是A",
    "<answer>C</answer>\nA",
    "<answer>A</answer><answer>C</answer>",
    "<answer>C</answer>\n<answer>C</answer>",
    "<answer>A</answer>\n<answer>B</answer>\n<answer>C</answer>\n<answer>D</answer>",
    "<answer>A,B,C,D</answer>",
    "<answer>ABCD</answer>",
    "<answer>C或D</answer>",
    "<answer>C. 丙</answer>",
    "<answer>丙</answer>",
    "<answer>E</answer>",
    "<answer></answer>",
    "<answer>C",
    "C</answer>",
    "<answer>\nC",
    "<answer><answer>C</answer>",
    "<answer>C</answer></answer>",
    "<answer>A</answer>\nC",
    "＜answer＞C＜/answer＞",
    "<think>\n是C。\n<answer>C</answer>",  # the thought does not end
    "<think>\n<answer>C</answer>\n</think>",  # nothing behind it
    "<answer>C</answer>\n<think>\n是C。",
    "<answer>A</answer>\n<think>\n改。\n</think>\n<answer>C</answer>",
]


@pytest.mark.parametrize("text", TAGGED + UNTAGGED)
def test_the_letter_in_the_strict_form(text):
    assert exam_reward(reply_of(text)) == 1
    assert exam_reward(reply_of(text, EXAM | {"answer": "A"})) == 0


@pytest.mark.parametrize("text", WITHOUT_FORM)
def test_no_other_form_is_rewarded_whatever_the_right_letter_is(text):
    assert [exam_reward(reply_of(text, EXAM | {"answer": letter})) for letter in "ABCD"] == [0] * 4
    assert format_reward(reply_of(text)) == 0


def test_no_reply_is_right_for_two_letters():
    letters = [f"{a}{mark}{b}" for a in "ABCD" for b in "ABCD" for mark in ("\n", "</answer>", "</answer><answer>")]
    for text in [*letters, *(f"<answer>{text}</answer>" for text in letters), *TAGGED, *UNTAGGED]:
        assert sum(exam_reward(reply_of(text, EXAM | {"answer": letter})) for letter in "ABCD") <= 1, text


def test_format():
    assert [format_reward(reply_of(text)) for text in TAGGED] == [1] * len(TAGGED)
    assert [format_reward(reply_of(text)) for text in UNTAGGED] == [0] * len(UNTAGGED)
    words = reply_of("想过了。\n<answer>请就诊</answer>", {"reference": "就诊"})
    assert format_reward(words) == 1, "without options some words"


def test_a_thought_that_the_prompt_opens():
    inside = "是A。\n<answer>A</answer>\n</think>\n\n<answer>C</answer>"
    assert exam_reward(reply_of(inside, opened=True)) == format_reward(reply_of(inside, opened=True)) == 1
    assert exam_reward(reply_of("是C。\n<answer>C</answer>", opened=True)) == 0


# ---------------------------------------------------------------- values by hand


@pytest.mark.parametrize(("n_tokens", "reward"), [(1, 0), (80, 0), (81, -0.05), (90, -0.5), (100, -1), (130, -1)])
def test_soft_overlong_punishment(n_tokens, reward):
    """DAPO's equation 13 with L_max 100 and L_cache 20."""
    assert length_reward(reply_of("", n_tokens=n_tokens), max_tokens=100, buffer=20) == pytest.approx(reward)


def test_likeness_to_the_reference_is_of_the_answer_alone():
    record = {"reference": "多喝水，休息"}
    assert reference_reward(reply_of("<think>\n多\n</think>\n\n多喝水，休息", record)) == 1
    # Four of the reply's six characters and of the reference's six, in order.
    assert reference_reward(reply_of("多喝茶，休养", record)) == pytest.approx(4 / 6)
    assert reference_reward(reply_of("<think>\n多喝水，休息", record)) == 0


def test_replies_are_decoded_without_their_end(tiny_tokenizer):
    def row(prompt: str) -> dict:
        messages = json.dumps([[{"role": "user", "content": "哪个？"}], None])
        return {"prompt_ids": tiny_tokenizer.encode(prompt), "messages": messages, "record": json.dumps(EXAM)}

    end = tiny_tokenizer.eos_token_id
    ids = [
        [*tiny_tokenizer.encode("<answer>C</answer>"), end],
        tiny_tokenizer.encode("没想完"),
        [*tiny_tokenizer.encode("甲"), end],
    ]
    rows = [row("哪个？"), row("哪个？<think>\n"), row("哪个？<think>\n\n</think>\n\n")]
    whole, cut, closed = scored_replies(tiny_tokenizer, rows, ids, torch.tensor([True, False, True]))
    assert (whole.text, whole.n_tokens, whole.ended) == ("<answer>C</answer>", len(ids[0]), True)
    assert exam_reward(whole) == 1
    assert (cut.thought, cut.answer, cut.ended) == ("没想完", "", False)
    assert (closed.thought, closed.answer) == ("", "甲")
    assert whole.prompt == [{"role": "user", "content": "哪个？"}]


# ---------------------------------------------------------------- the flags


def test_weighted_sum():
    args = RewardArguments(rewards=["exam:1", "format:0.5", "length"], length_buffer=2)
    rewards = load_rewards(args, response_length=8)
    assert rewards.names == ("exam", "format", "length")
    assert rewards.needed_keys == ("answer",)
    given = rewards([reply_of("<answer>C</answer>", n_tokens=7), reply_of("C"), reply_of("<answer>A</answer>")])
    assert given.tolist() == [[1, 1, -0.5], [1, 0, 0], [0, 1, 0]]
    assert given.dtype == torch.float32
    assert rewards.total(given).tolist() == [1.0, 1.0, 0.5]


def test_the_reward_models_column_is_the_callers():
    args = RewardArguments(rewards=["format", "reward_model:2"], reward_model_path="rm")
    rewards = load_rewards(args, response_length=8)
    scores = torch.tensor([0.25, -1.0])
    given = rewards([reply_of("<answer>C</answer>"), reply_of("C")], scores)
    assert given.tolist() == [[1, 0.25], [0, -1]]
    assert rewards.total(given).tolist() == [1.5, -2]
    alone = load_rewards(RewardArguments(reward_model_path="rm"), 8)
    assert torch.equal(alone.total(alone([reply_of("")] * 2, scores)), scores)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"rewards": ["exam:x"]}, "--rewards exam:x: write a name, or a name and a weight such as exam:0.5"),
        ({"rewards": ["exam:nan"]}, "--rewards exam:nan: write a name"),
        ({"rewards": ["exam:1e30"]}, "--rewards exam:1e30: write a name"),
        (
            {"rewards": ["exam:-1"]},
            "--rewards exam:-1: exam is higher for better replies, and a weight below 0 teaches",
        ),
        ({"rewards": ["exam", "length:-0.5"]}, "--rewards length:-0.5: length is higher for better replies"),
        ({"rewards": ["exam", "exam:2"]}, "--rewards exam exam:2: one of them is named twice"),
        ({"rewards": ["exam:0"]}, "--rewards exam:0: give one of them a weight other than 0"),
        ({}, "--reward_model_path is missing: name a folder of reward_modeling.py, or score by other --rewards"),
        ({"rewards": ["exam"], "reward_model_path": "rm"}, "--reward_model_path rm: add reward_model to --rewards"),
        ({"rewards": ["exam"], "length_buffer": 5}, "--length_buffer 5: length is missing from --rewards"),
        ({"rewards": ["length"], "length_buffer": 0}, "--length_buffer 0: give at least 1"),
        ({"rewards": ["exam", "format"], "exam_format": "letter"}, "--exam_format letter: such prompts ask for no <an"),
        ({"rewards": ["length"], "length_buffer": 50}, "--length_buffer 50: more than --response_length 40"),
        (
            {"rewards": ["exams"]},
            "--rewards exams: there are exam, format, reference, length, judge, reward_model; --rew",
        ),
        ({"rewards": ["exam"], "reward_file": "absent.py"}, "--reward_file absent.py: there is no such file"),
    ],
)
def test_flags_that_are_refused(flags, message):
    with pytest.raises(UserError) as raised:
        load_rewards(RewardArguments(**flags), response_length=40)
    assert str(raised.value).startswith(message)


# ---------------------------------------------------------------- functions of the user's own file


@pytest.fixture
def own_rewards(tmp_path):
    """A function that loads the rewards of a file with this text, and the path of that file."""

    def load(text: str, *names: str):
        file = tmp_path / "my_rewards.py"
        file.write_text(text, encoding="utf-8")
        return load_rewards(RewardArguments(rewards=list(names), reward_file=str(file)), response_length=40)

    return load


def test_a_function_gets_replies_and_records(own_rewards):
    text = """
import numpy
from dataclasses import dataclass

@dataclass
class Word:
    text: str

def keywords(replies, records):
    return [sum(word in reply.answer for word in record["keywords"]) for reply, record in zip(replies, records)]

def as_array(replies, records):
    return numpy.array([reply.n_tokens for reply in replies], dtype="float32")

def _private(replies, records):
    return None
"""
    rewards = own_rewards(text, "keywords:2", "as_array", "exam:0")
    record = EXAM | {"keywords": ["就诊", "休息"]}
    given = rewards([reply_of("<think>\n休息\n</think>\n\n请就诊", record), reply_of("就诊，休息", record)])
    assert given.tolist() == [[1, 5, 0], [2, 5, 0]]
    assert rewards.total(given).tolist() == [7, 9]


def test_a_function_that_counts_faults_may_have_a_weight_below_0(own_rewards):
    rewards = own_rewards("def repeats(replies, records):\n    return [2, -1e6]\n", "exam", "repeats:-0.5")
    given = rewards([reply_of("C"), reply_of("D")])
    assert rewards.total(given).tolist() == [0.0, 5e5]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", r"reward mine \(.*my_rewards.py\): it gave 1 numbers for 2 replies; return one for each"),
        ("return [float('nan')] * 2", r"reward mine \(.*\): it gave nan for a reply; return a finite number"),
        ("return [1, 1e30]", r"reward mine \(.*\): it gave 1e\+30 for a reply, beside which float32 loses the KL"),
        ("return [-10**400, 1]", r"reward mine \(.*\): it gave -10+ for a reply, beside which float32"),
        ("return [1, None]", r"reward mine \(.*\): it gave None for a reply"),
        ("return ['1', '2']", r"reward mine \(.*\): it gave '1' for a reply"),
        ("return 1 / 0", r"reward mine: .*my_rewards.py:2: ZeroDivisionError: division by zero"),
        ("return records[0]['keywords']", r"reward mine: .*my_rewards.py:2: KeyError: 'keywords'"),
        ("return None", r"reward mine \(.*my_rewards.py\): it returned None; return a list of numbers, one for each"),
        ("return 1.0", r"reward mine \(.*my_rewards.py\): it returned 1.0; return a list of numbers, one for each"),
        ("return '12'", r"reward mine \(.*\): it returned '12'; return a list of numbers"),
        ("import sys; sys.exit(3)", r"reward mine: .*my_rewards.py:2: SystemExit: 3$"),
        ("raise SystemExit", r"reward mine: .*my_rewards.py:2: SystemExit$"),
    ],
)
def test_faults_of_a_function_are_one_line_with_its_name(own_rewards, body, message):
    rewards = own_rewards(f"def mine(replies, records):\n    {body}\n", "mine")
    with pytest.raises(UserError, match=f"^{message}") as raised:
        rewards([reply_of("甲"), reply_of("乙")])
    assert "\n" not in str(raised.value)
    row = {"messages": json.dumps([[], None]), "record": json.dumps(EXAM)}
    with pytest.raises(UserError, match="reward mine"):
        rewards.rehearse(Dataset.from_list([row]))


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("def mine(:", ["mine"], r"--reward_file .*my_rewards.py: .*my_rewards.py:1: SyntaxError: "),
        (
            "import absent_package",
            ["mine"],
            r"--reward_file .*:1: ModuleNotFoundError: No module named 'absent_package'",
        ),
        ("import sys\nsys.exit('no')", ["mine"], r"--reward_file .*my_rewards.py:2: SystemExit: no$"),
        ("async def mine(replies, records): ...", ["mine"], r"--reward_file .*: mine is an async def, which nothing"),
        ("def mine(replies): ...", ["mine"], r"--reward_file .*: mine must take \(replies, records\); .* \(replies\)$"),
        ("X = 1", ["mine"], r"--reward_file .*: it defines no function; docs/ppo.md has an example"),
        ("def exam(replies, records): ...", ["exam"], r"--reward_file .*: exam is a reward here already; rename it"),
        ("def mine(replies, records): ...", ["exam"], r"--reward_file .*: name its functions in --rewards: mine"),
        ("def mine(replies, records): ...", ["yours"], r"--rewards yours: there are .*mine, judge, reward_model$"),
    ],
)
def test_files_that_are_refused(own_rewards, text, names, message):
    with pytest.raises(UserError, match=f"^{message}") as raised:
        own_rewards(text, *names)
    assert "\n" not in str(raised.value)


def test_ctrl_c_in_a_function_stays_one(own_rewards):
    rewards = own_rewards("def mine(replies, records):\n    raise KeyboardInterrupt\n", "mine")
    with pytest.raises(KeyboardInterrupt):
        rewards([reply_of("甲")])
