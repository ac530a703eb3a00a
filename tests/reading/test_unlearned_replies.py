"""Replies that are read and not learned, and thoughts that a template leaves out: exact masks."""

import json

import pytest
from check_data import main as check_main
from reading_cases import assistant, user
from template_cases import EXPECTED, WORDY

from medtune.errors import Unusable
from medtune.reading.conversations import to_dialogue
from medtune.reading.encoders import DialogueEncoder, PromptEncoder
from medtune.reading.records import Dialogue, Question
from medtune.reading.stage_data import encode_records
from medtune.reading.tokenization import (
    IGNORED_LABEL,
    encode_dialogue,
    load_chat_template,
    mark_learned,
    n_thoughts_left_out,
)

NO_LIMIT = 100_000


OLD, NEW = "随便吃，旧的错误回答。", "通常饭后服用，请遵医嘱。"
ASKED = [user("阿司匹林能空腹吃吗？"), assistant(OLD), user("真的吗？"), assistant(NEW)]
UNLEARNED = [ASKED[0], assistant(OLD, weight=0), *ASKED[2:]]
THOUGHTS = [
    user("咳嗽两周怎么办？"),
    assistant("<think>\n先问痰。\n</think>\n\n有痰吗？"),
    user("有痰，不发热。"),
    assistant("<think>\n多为感染后。\n</think>\n\n可先观察。"),
    user("还抽烟。"),
    assistant("<think>\n吸烟者查胸片。\n</think>\n\n请戒烟并拍胸片。"),
]


@pytest.fixture
def tokenizer(families_tokenizer):
    families_tokenizer.bos_token, families_tokenizer.eos_token = None, "<|im_end|>"
    return families_tokenizer


@pytest.mark.parametrize("name", [name for name in EXPECTED if name not in {*WORDY, "qwen3_5"}])
@pytest.mark.parametrize("train_on_inputs", [False, True])
def test_a_reply_of_weight_0_has_no_label_and_the_same_ids(tokenizer, name, train_on_inputs):
    tokenizer.bos_token, tokenizer.eos_token = EXPECTED[name][0][0], EXPECTED[name][0][-1]
    template = load_chat_template(tokenizer, name)
    encode = lambda messages: encode_dialogue(  # noqa: E731
        tokenizer, template, messages, max_length=NO_LIMIT, train_on_inputs=train_on_inputs
    )
    (ids, all_labels), (same_ids, labels) = encode(ASKED), encode(UNLEARNED)
    assert ids == same_ids
    changed = [index for index, (before, after) in enumerate(zip(all_labels, labels, strict=True)) if before != after]
    assert changed == list(range(changed[0], changed[-1] + 1))
    assert all(labels[index] == IGNORED_LABEL for index in changed)
    assert OLD in tokenizer.decode([ids[index] for index in changed])
    assert NEW not in tokenizer.decode([ids[index] for index in changed])


def test_the_example_in_the_log_shows_what_is_learned(tokenizer):
    template = load_chat_template(tokenizer, "chatml")
    shown = mark_learned(tokenizer, *encode_dialogue(tokenizer, template, UNLEARNED, max_length=NO_LIMIT))
    assert f"«{OLD}" not in shown
    assert f"«{NEW}<|im_end|>»" in shown


def test_what_is_left_at_the_limit_has_something_to_learn(tokenizer):
    template = load_chat_template(tokenizer, "chatml")
    messages = [*ASKED[:2], user("真的吗？"), assistant(NEW, weight=0)]
    ids, _ = encode_dialogue(tokenizer, template, messages, max_length=NO_LIMIT)
    for truncation in ("cut_prompt_start", "cut_reply"):
        with pytest.raises(Unusable) as refused:
            n_kept = len(ids) - 1 if truncation == "cut_prompt_start" else 8
            encode_dialogue(tokenizer, template, messages, max_length=n_kept, truncation=truncation)
        assert refused.value.reason == "prompt too long"


@pytest.mark.parametrize(("name", "n_left_out"), [("qwen3", 2), ("glm4_moe", 2), ("chatml", 0), ("qwen", 0)])
def test_thoughts_that_the_template_leaves_out_are_counted(tokenizer, name, n_left_out):
    template = load_chat_template(tokenizer, name)
    assert n_thoughts_left_out(template, THOUGHTS, None) == n_left_out
    assert n_thoughts_left_out(template, ASKED, None) == 0
    dialogues = [Dialogue(THOUGHTS, None, "d.jsonl:1"), Dialogue(ASKED, None, "d.jsonl:2")]
    rows, report = encode_records(dialogues, DialogueEncoder(tokenizer, template, NO_LIMIT))
    assert set(rows.column_names) == {"input_ids", "labels", "length", "source"}
    expected = f"{DialogueEncoder(tokenizer, template, NO_LIMIT).left_out_thoughts}: 2, the first in d.jsonl:1"
    assert report.notes == ([expected] if n_left_out else [])


def test_check_data_counts_thoughts_too(tiny_model_dir, write_jsonl, capsys):
    path = write_jsonl("d/train.jsonl", [{"messages": THOUGHTS}])
    check_main(["--dir", str(path), "--model_name_or_path", str(tiny_model_dir), "--template_name", "qwen3"])
    assert "left out by the template while the replies are learned: 2, the first in" in capsys.readouterr().out


def test_prompts_of_ppo_may_have_no_reply(tiny_tokenizer):
    template = load_chat_template(tiny_tokenizer, None)
    questions = [Question([user("一"), assistant("二"), user("三")], None, "d:1"), Question([user("四")], None, "d:2")]
    rows, report = encode_records(questions, PromptEncoder(tiny_tokenizer, template, NO_LIMIT, "drop"))
    assert rows["reply"] == ["二", "", ""]
    assert [len(json.loads(messages)[0]) for messages in rows["messages"]] == [1, 3, 1]
    assert report.kept == 3


def test_a_weight_survives_writing_and_reading():
    assert to_dialogue({"messages": UNLEARNED}, "d:1").messages == UNLEARNED
