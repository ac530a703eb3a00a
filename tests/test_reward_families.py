"""Reward models of families that transformers has no class with a score head for: training, merging, PPO, scores."""

import json
from pathlib import Path

import pytest
from stage_runs import PARTS, train, train_sft, words, write_lines
from tiny_families import save_multimodal_model_of_text_class, save_tiny_model

import inference
import merge_peft_adapter
import ppo_training
import reward_modeling
from medtune.models.lineage import base_of
from medtune.models.reward_models import load_reward_model

PAIRS = [
    {"question": f"{part}疼怎么办？", "response_chosen": f"{part}疼请就诊。", "response_rejected": "不用管。"}
    for part in PARTS
]
NO_DROPOUT = ("--lora_dropout", "0")


def save_family(family: str, folder: Path, tokenizer_from: Path) -> Path:
    if family == "qwen3_5":
        return save_multimodal_model_of_text_class(folder, tokenizer_from)
    return save_tiny_model(family, folder, tokenizer_from)


def ppo_flags(folder: Path, policy: Path, reward_model: Path, **changes) -> list[str]:
    values = {
        "sft_model_path": policy,
        "reward_model_path": reward_model,
        "template_name": "qwen",
        "train_file_dir": write_lines(folder / "prompts/data.jsonl", [{"question": p["question"]} for p in PAIRS * 4]),
        "do_train": True,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "response_length": 8,
        "max_steps": 1,
        "output_dir": folder / "out",
        "cache_dir": folder / "cache",
    }
    return words(values | changes)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["lfm2", "gemma4_text", "qwen3_5", "nemotron_h"])
def test_a_reward_adapter_after_sft_serves_ppo_and_merges(family, tmp_path, tiny_model_dir, capfd):
    base = save_family(family, tmp_path / "base", tiny_model_dir)
    named = ("--target_modules", "q_proj,v_proj", *NO_DROPOUT)
    sft = train_sft(tmp_path / "sft", base, *named)
    reward_model = train(reward_modeling, tmp_path / "rm", sft, PAIRS, *NO_DROPOUT)
    assert base_of(str(reward_model)) == str(base)

    capfd.readouterr()
    ppo_training.main(ppo_flags(tmp_path / "ppo", sft, reward_model))
    log = capfd.readouterr().err
    assert "an adapter on the same base" in log
    assert "starts as the reward model" in log

    files = ("--base_model", base, "--lora_model", reward_model, "--output_dir", tmp_path / "merged")
    merge_peft_adapter.main([*map(str, files), "--torch_dtype", "float32"])
    assert "```python" in (tmp_path / "merged/README.md").read_text(encoding="utf-8")

    scores = {}
    (questions := tmp_path / "questions.txt").write_text("头疼怎么办？\n胃疼怎么办？\n", encoding="utf-8")
    for name, path in (("adapter", reward_model), ("merged", tmp_path / "merged")):
        options = {"base_model": base, "data_file": questions, "reward_model": path, "max_new_tokens": 6}
        inference.main(words(options | {"output_file": tmp_path / f"{name}.jsonl", "template_name": "qwen"}))
        replies = (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        scores[name] = [json.loads(reply)["score"] for reply in replies]
    assert scores["merged"] == pytest.approx(scores["adapter"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--use_peft", "False"), ("--load_in_4bit", "True", *NO_DROPOUT)], ids=str)
@pytest.mark.parametrize("family", ["lfm2", "qwen3_5_moe_text"])
def test_whole_and_quantized_reward_models(family, flags, tmp_path, tiny_model_dir):
    base = save_family(family, tmp_path / "base", tiny_model_dir)
    reward_model = train(reward_modeling, tmp_path / "rm", base, PAIRS, *flags)
    is_whole = "--use_peft" in flags
    loaded = load_reward_model(*((str(reward_model), None) if is_whole else (str(base), str(reward_model))))
    assert type(loaded if is_whole else loaded.get_base_model()).__name__.endswith("ForSequenceClassification")
    ppo_training.main(ppo_flags(tmp_path / "ppo", base, reward_model, lora_dropout=0))
