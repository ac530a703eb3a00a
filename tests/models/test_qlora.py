"""QLoRA in every stage, on the CPU: it learns as on the bfloat16 base, and merges into that base as it should."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stage_runs import STAGES, logged, stage_flags
from transformers import AutoModelForCausalLM

import dpo_training
import merge_peft_adapter
import pretraining
import reward_modeling
import supervised_finetuning
from medtune.models.adapters import load_with_adapter
from medtune.models.loading import load_base_model
from medtune.models.reward_models import load_reward_model
from medtune.training.checkpoints import BEST

MAINS = {
    "pt": pretraining.main,
    "sft": supervised_finetuning.main,
    "rm": reward_modeling.main,
    "dpo": dpo_training.main,
}
LEARNING = {"max_steps": 20, "save_strategy": "no", "lora_dropout": 0, "learning_rate": 2e-3}
# Pairs that are told apart completely after 20 steps would leave losses near 0, which compare with nothing.
FOR_PAIRS = {"pt": {}, "sft": {}, "rm": {"learning_rate": 2e-4}, "dpo": {"learning_rate": 1e-4}}


@pytest.fixture(scope="module")
def bf16_base(tiny_model_dir, tmp_path_factory) -> Path:
    """The tiny model with weights in bfloat16, as published models have them."""
    folder = tmp_path_factory.mktemp("bf16") / "tiny-qwen2"
    shutil.copytree(tiny_model_dir, folder)
    AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", sorted(STAGES))
def test_it_learns_as_on_the_bf16_base(bf16_base, tmp_path, stage):
    for name, options in (("bf16", {}), ("quantized", {"load_in_4bit": True})):
        options |= LEARNING | FOR_PAIRS[stage]
        MAINS[stage](stage_flags(stage, bf16_base, tmp_path, **options, output_dir=tmp_path / name))
    plain, quantized = logged(tmp_path / "bf16"), logged(tmp_path / "quantized")
    last = [sum(losses[step] for step in range(16, 21)) / 5 for losses in (plain, quantized)]
    assert last[1] == pytest.approx(last[0], rel=0.05)
    assert last[1] < quantized[1]
    weights = load_file(tmp_path / "quantized" / BEST / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in weights.items() if "lora_B" in name)


@pytest.mark.parametrize("stage", ["sft", pytest.param("dpo", marks=pytest.mark.slow)])
def test_its_adapter_merges_into_the_bf16_base(bf16_base, tmp_path, tiny_tokenizer, stage):
    MAINS[stage](stage_flags(stage, bf16_base, tmp_path, **LEARNING | {"load_in_4bit": True}))
    best, merged = str(tmp_path / "out" / BEST), str(tmp_path / "merged")
    merge_peft_adapter.main(["--base_model", str(bf16_base), "--lora_model", best, "--output_dir", merged])
    ids = torch.tensor([tiny_tokenizer.encode("感冒了应该怎么办？")])
    models = {
        "adapter": load_with_adapter(str(bf16_base), best, torch_dtype="float32"),
        "merged": load_base_model(merged),
        "base": load_base_model(str(bf16_base), torch_dtype="float32"),
    }
    with torch.no_grad():
        logits = {name: model.eval()(ids).logits.float() for name, model in models.items()}
    assert models["merged"].dtype == torch.bfloat16
    learned, lost = ((logits["adapter"] - logits[name]).norm() for name in ("base", "merged"))
    assert lost < 0.05 * learned, (lost, learned)


@pytest.mark.slow
def test_its_reward_model_scores(tiny_model_dir, tmp_path, tiny_tokenizer):
    reward_modeling.main(stage_flags("rm", tiny_model_dir, tmp_path, **LEARNING | {"load_in_4bit": True}))
    model = load_reward_model(str(tiny_model_dir), str(tmp_path / "out" / BEST), torch_dtype="float32")
    good, bad = (torch.tensor([tiny_tokenizer.encode(text)]) for text in ("请就诊，注意休息。", "不用管。"))
    assert model(good).logits.isfinite().all()
    assert model(good).logits.item() != model(bad).logits.item()
