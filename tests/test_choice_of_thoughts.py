"""--thinking from stage to stage: what stops a run, what is recorded, resumed, inherited and asked from then on."""

import re
from pathlib import Path

import pytest
from reading_cases import assistant, fault_of, user
from stage_runs import PARTS, train
from transformers import AutoTokenizer

import dpo_training
import reward_modeling
import supervised_finetuning
from medtune.models.chat_models import ChatModelArguments, RewardModel, describe_model
from medtune.models.lineage import read_lineage
from medtune.reading.tokenization import encode_prompt
from medtune.training.template_choice import TemplateArguments, choose_thinking

QUESTIONS = [f"{part}疼怎么办？" for part in PARTS]
DIALOGUES = [
    {"messages": [user(question), assistant("请就诊。", reasoning_content="先问病程。")]} for question in QUESTIONS
]
PAIRS = [
    {"prompt": question, "chosen": [assistant("请就诊。", reasoning_content="先问病程。")], "rejected": "不用管。"}
    for question in QUESTIONS
]
HEADER, EMPTY = "<|im_end|>\n<|im_start|>assistant\n", "<think>\n\n</think>\n\n"


def sft(folder: Path, model: Path, *flags: str) -> Path:
    return train(supervised_finetuning, folder, model, DIALOGUES, "--template_name", "qwen3", *flags)


@pytest.fixture(scope="module")
def trained(tiny_model_dir, tmp_path_factory) -> Path:
    """What SFT with an empty thought leaves. Read only."""
    return sft(tmp_path_factory.mktemp("empty"), tiny_model_dir, "--thinking", "empty")


def asked_by(path: Path, template_name: str | None = None) -> str:
    """The end of the prompt with which inference, server and evaluation ask."""
    chat_model = describe_model(ChatModelArguments(str(path), template_name=template_name))
    prompt = chat_model.tokenizer.decode(encode_prompt(chat_model.tokenizer, chat_model.chat_template, [user("疼？")]))
    by_server = AutoTokenizer.from_pretrained(path).apply_chat_template(
        [user("疼？")], add_generation_prompt=True, tokenize=False, enable_thinking=True
    )
    assert prompt == by_server, "a server asks by what is saved, whatever it would switch on"
    return prompt.partition("疼？")[2]


def test_thoughts_in_keys_stop_a_run_before_weights_load(tiny_model_dir, tmp_path, monkeypatch):
    for stage, records in ((supervised_finetuning, DIALOGUES), (dpo_training, PAIRS), (reward_modeling, PAIRS)):
        monkeypatch.setattr(stage, "load_for_training", lambda *a, **k: pytest.fail("a model was loaded"))
        line = fault_of(train, stage, tmp_path / stage.__name__, tiny_model_dir, records)
        assert line.startswith(
            "data.jsonl: thoughts of replies in a key of their own ('reasoning_content'): 8; say what"
        )
    line = fault_of(sft, tmp_path, tiny_model_dir, "--template_name", "qwen3_nothink", "--thinking", "keep")
    assert line.startswith("--thinking keep: --template_name qwen3_nothink asks for replies with an empty thought")


def test_the_choice_is_recorded_and_asked_from_then_on(trained):
    lineage = read_lineage(trained)
    assert (lineage.template, lineage.thinking) == ("qwen3", "empty")
    assert asked_by(trained) == asked_by(trained, "qwen3") == asked_by(trained, "qwen3_nothink") == HEADER + EMPTY
    assert "--template_name chatml: it asks in another form" in fault_of(asked_by, trained, "chatml")


@pytest.mark.parametrize(("thinking", "end"), [("keep", HEADER), ("drop", HEADER)])
def test_other_choices(tiny_model_dir, tmp_path, thinking, end):
    trained = sft(tmp_path, tiny_model_dir, "--thinking", thinking)
    assert (read_lineage(trained).thinking, asked_by(trained), asked_by(trained, "qwen3")) == (thinking, end, end)


def test_a_resumed_run_keeps_its_choice_and_refuses_another(tiny_model_dir, tmp_path, capfd):
    sft(tmp_path, tiny_model_dir, "--thinking", "drop")
    capfd.readouterr()
    resume = ("--resume_from_checkpoint", "True", "--max_steps", "3")
    assert fault_of(sft, tmp_path, tiny_model_dir, *resume, "--thinking", "keep").startswith(
        f"--thinking keep: the run in {tmp_path}/out was started with drop, and a resumed run goes on with that"
    )
    assert read_lineage(sft(tmp_path, tiny_model_dir, *resume)).thinking == "drop"
    log = capfd.readouterr().err
    assert f"--thinking drop: as {tmp_path}/out/checkpoint-2 was trained" in log
    assert "«请就诊。<|im_end|>»" in log


def test_later_stages_go_on_with_the_choice(trained, tmp_path, capfd):
    aligned = train(dpo_training, tmp_path / "dpo", trained, PAIRS, "--template_name", "qwen3")
    assert (read_lineage(aligned).thinking, asked_by(aligned)) == ("empty", HEADER + EMPTY)
    log = capfd.readouterr().err
    assert f"--thinking empty: as {trained} was trained" in log
    assert re.search(r"  template +qwen3, --thinking empty\n", log)
    assert "learned with empty" not in log
    assert f"{HEADER}{EMPTY}«请就诊。<|im_end|>»" in log
    assert "thoughts of replies that are learned without them (--thinking empty): 8, the first in" in log
    other = train(dpo_training, tmp_path / "keep", trained, PAIRS, "--template_name", "qwen3", "--thinking", "keep")
    assert (read_lineage(other).thinking, asked_by(other)) == ("keep", HEADER)
    log = capfd.readouterr().err
    assert re.search(r"  template +qwen3, --thinking keep\n", log)
    assert f"{HEADER}«<think>\n先问病程。\n</think>\n\n请就诊。<|im_end|>»" in log
    assert log.count(f"--thinking keep: {trained} learned with empty; prompts and replies differ from what") == 1
    # A template's name may be the other choice; a run that goes on has been told.
    nothink = TemplateArguments(template_name="qwen3_nothink")
    assert [choose_thinking(nothink, str(other), checkpoint) for checkpoint in (None, str(aligned))] == ["empty"] * 2
    warning = f"--template_name qwen3_nothink: --thinking empty: {other} learned with keep; prompts and replies differ"
    assert capfd.readouterr().err.count(warning) == 1


def test_a_reward_model_scores_thoughts_where_it_was_trained_on_some(tiny_model_dir, tmp_path):
    plain = [{"prompt": question, "chosen": "请就诊。", "rejected": "不用管。"} for question in QUESTIONS]
    for name, records, thinking, reads_thoughts in (
        *(("keep", PAIRS, "keep", True), ("drop", PAIRS, "drop", False), ("plain", plain, "keep", False)),
    ):
        flags = ("--template_name", "chatml", "--thinking", thinking)
        path = train(reward_modeling, tmp_path / name, tiny_model_dir, records, *flags)
        assert read_lineage(path).reads_thoughts == reads_thoughts
        scorer = RewardModel(str(path), ChatModelArguments(str(tiny_model_dir)))
        read = scorer.tokenizer.decode(scorer.encode([user("疼？")], "<think>\n先想。\n</think>\n\n请就诊。"))
        thought = "<think>\n先想。\n</think>\n\n" if reads_thoughts else ""
        assert read == f"<|im_start|>user\n疼？{HEADER}{thought}请就诊。<|im_end|>"
