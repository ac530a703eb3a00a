"""PPO and GRPO on a GPU: the first update starts where the policy is, and what is learned is finite and kept."""

import math
from pathlib import Path

import pytest
from stage_runs import history, train_sft, weights_of
from test_distillation_training import short_run as distillation_flags
from test_grpo_training import short_run as grpo_flags
from test_on_one_gpu import HAS_BFLOAT16, needs_bfloat16
from test_ppo_training import short_run as ppo_flags
from test_ppo_training import train_rm

import distillation_training
import grpo_training
import ppo_training
from medtune.training.checkpoints import BEST

DTYPES = ["float32", pytest.param("bfloat16", marks=needs_bfloat16)]


@pytest.fixture(scope="module")
def before(tiny_model_dir, tmp_path_factory) -> tuple[Path, Path]:
    """An SFT model and a reward model on its base."""
    sft = train_sft(tmp_path_factory.mktemp("sft"), tiny_model_dir, "--max_steps", "12")
    return sft, train_rm(tmp_path_factory.mktemp("rm"), sft)


@pytest.fixture
def run(before, tmp_path):
    """A function that trains PPO or GRPO for two updates of one epoch and returns their figures."""

    def train(stage: str, **options) -> list[dict]:
        sft, rm = before
        if stage == "ppo":
            ppo_training.main(ppo_flags(sft, rm, tmp_path, num_ppo_epochs=1, **options))
        else:
            grpo_training.main(grpo_flags(sft, tmp_path, **options))
        weights = weights_of(tmp_path / "out" / BEST)
        assert all(tensor.isfinite().all() for tensor in weights.values())
        return history(tmp_path / "out")

    return train


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_the_first_update_starts_at_ratio_one(run, stage, dtype):
    first = run(stage, torch_dtype=dtype, max_steps=1)[0]
    assert first["policy/ratio"] == pytest.approx(1.0, abs=1e-3 if dtype == "float32" else 0.02)
    assert first["policy/clip_frac"] == pytest.approx(0.0, abs=0.02)
    assert 0 <= first["policy/approx_kl"] < 1


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_its_figures_are_finite(run, stage):
    entries = run(stage, torch_dtype="bfloat16" if HAS_BFLOAT16 else "float32")
    assert len([entry for entry in entries if "policy/ratio" in entry]) == 2
    for entry in entries:
        assert all(math.isfinite(value) for value in entry.values() if isinstance(value, float)), entry


@needs_bfloat16
@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_on_a_quantized_base(run, stage):
    first = run(stage, torch_dtype="bfloat16", load_in_4bit=True, max_steps=1)[0]
    assert first["policy/ratio"] == pytest.approx(1.0, abs=0.02)


@needs_bfloat16
@pytest.mark.parametrize("beta", [None, 0.5])
def test_a_quantized_teacher(tiny_model_dir, adapter, tmp_path, beta):
    options = {"torch_dtype": "bfloat16", "teacher_bits": 4, "beta": beta, "do_eval": True, "max_eval_samples": 4}
    distillation_training.main(distillation_flags(tiny_model_dir, adapter, tmp_path, **options))
    entries = history(tmp_path / "out")
    assert len([entry for entry in entries if "policy/loss" in entry]) == 2
    for entry in entries:
        assert all(math.isfinite(value) for value in entry.values() if isinstance(value, float)), entry
    assert entries[0]["eval_teacher_kl"] > 0
