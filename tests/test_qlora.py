"""QLoRA in every stage, on the CPU: it learns as on the plain base, and merges into the plain base as it should."""

import pytest
import torch
from safetensors.torch import load_file
from stage_runs import STAGES, logged, stage_flags

import dpo_training
import pretraining
import reward_modeling
import supervised_finetuning
from checkpoints import BEST
from model_loading import load_base_model, load_reward_model, load_with_adapter

MAINS = {
    "pt": pretraining.main,
    "sft": supervised_finetuning.main,
    "rm": reward_modeling.main,
    "dpo": dpo_training.main,
}
LEARNING = {"max_steps": 20, "save_strategy": "no", "lora_dropout": 0, "learning_rate": 2e-3}


@pytest.mark.slow
@pytest.mark.parametrize("stage", sorted(STAGES))
def test_it_learns_as_on_the_plain_base(tiny_model_dir, tmp_path, stage):
    for name, options in (("plain", {"torch_dtype": "bfloat16"}), ("quantized", {"load_in_4bit": True})):
        argv = stage_flags(stage, tiny_model_dir, tmp_path, **LEARNING | options, output_dir=tmp_path / name)
        MAINS[stage](argv)
    plain, quantized = logged(tmp_path / "plain"), logged(tmp_path / "quantized")
    last = [sum(losses[step] for step in range(16, 21)) / 5 for losses in (plain, quantized)]
    assert last[1] == pytest.approx(last[0], rel=0.05, abs=1e-3)  # DPO is near 0 by then
    assert last[1] < quantized[1]
    weights = load_file(tmp_path / "quantized" / BEST / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in weights.items() if "lora_B" in name)


@pytest.mark.parametrize("stage", ["sft", pytest.param("dpo", marks=pytest.mark.slow)])
def test_its_adapter_merges_into_the_plain_base(tiny_model_dir, tmp_path, tiny_tokenizer, stage):
    argv = stage_flags(stage, tiny_model_dir, tmp_path, **LEARNING | {"max_steps": 4, "load_in_4bit": True})
    MAINS[stage](argv)
    ids = torch.tensor([tiny_tokenizer.encode("感冒了应该怎么办？")])
    model = load_with_adapter(str(tiny_model_dir), str(tmp_path / "out" / BEST), torch_dtype="float32").eval()
    base = load_base_model(str(tiny_model_dir), torch_dtype="float32").eval()
    with torch.no_grad():
        learned, before = model(ids).logits, base(ids).logits
        merged = model.merge_and_unload()(ids).logits
    torch.testing.assert_close(merged, learned, atol=1e-4, rtol=1e-4)
    assert (learned - before).abs().max() > 1e-2


@pytest.mark.slow
def test_its_reward_model_scores(tiny_model_dir, tmp_path, tiny_tokenizer):
    reward_modeling.main(stage_flags("rm", tiny_model_dir, tmp_path, **LEARNING | {"load_in_4bit": True}))
    model = load_reward_model(str(tiny_model_dir), str(tmp_path / "out" / BEST), torch_dtype="float32")
    good, bad = (torch.tensor([tiny_tokenizer.encode(text)]) for text in ("请就诊，注意休息。", "不用管。"))
    assert model(good).logits.isfinite().all()
    assert model(good).logits.item() != model(bad).logits.item()
