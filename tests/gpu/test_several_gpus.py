"""NCCL and DeepSpeed on GPUs: several train as one does with more accumulation, and leave what one leaves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stage_runs import RL_STAGES, ROOT, STAGES, history, logged, stage_flags, train_sft
from test_distillation_training import short_run as distillation_flags
from test_grpo_training import short_run as grpo_flags
from test_ppo_training import short_run as ppo_flags
from test_ppo_training import train_rm

from medtune.machine.between_gpus import check_all_reduce
from medtune.machine.findings import WRONG
from medtune.training.checkpoints import BEST

GPUS = os.environ.get("GPU_TESTS", "").split(",")
needs_two = pytest.mark.skipif(len(GPUS) < 2, reason="two GPUs are needed")
# In float32, whose sums the GPUs take in another order.
PLAIN = {
    **{"torch_dtype": "float32", "bf16": False, "lora_dropout": 0, "max_grad_norm": 0},
    **{"max_steps": 3, "save_strategy": "no"},
}


def launch(script: str, argv: list[str], gpus: list[str], n_processes: int) -> str:
    """Start it as a launcher does, on these GPUs; its log."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(gpus), "N_PROCESSES": str(n_processes)}
    command = [sys.executable, "-m", "medtune.launch", script, *argv]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stderr


@needs_two
def test_the_gpus_reach_each_other(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(GPUS))
    findings = list(check_all_reduce(len(GPUS), tmp_path / "log"))
    assert [str(finding) for finding in findings if finding.grade == WRONG] == []


@pytest.fixture
def on_one(tiny_model_dir, tmp_path):
    """A function that trains a stage on one GPU with twice the accumulation; its losses and its weights."""

    def train(stage: str, **options) -> tuple[list[float], dict[str, torch.Tensor]]:
        options = PLAIN | {"gradient_accumulation_steps": 4, "output_dir": tmp_path / "one"} | options
        launch(f"{STAGES[stage]}.py", stage_flags(stage, tiny_model_dir, tmp_path, **options), GPUS[:1], 1)
        return left(tmp_path / "one")

    return train


def left(folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    [weights] = (folder / BEST).glob("*model.safetensors")
    return list(logged(folder).values()), load_file(weights)


def assert_close(found: tuple, wanted: tuple) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=2e-3)
    for name, tensor in wanted[1].items():
        assert (found[1][name].float() - tensor.float()).abs().max() < 2e-3, name


@needs_two
@pytest.mark.parametrize("stage", sorted(STAGES))
def test_two_gpus_train_as_one_with_twice_the_accumulation(tiny_model_dir, tmp_path, on_one, stage):
    options = PLAIN | {"gradient_accumulation_steps": 2, "output_dir": tmp_path / "two"}
    log = launch(f"{STAGES[stage]}.py", stage_flags(stage, tiny_model_dir, tmp_path, **options), GPUS[:2], 2)
    assert "2 process(es)" in log
    assert_close(left(tmp_path / "two"), on_one(stage))


@pytest.mark.parametrize("use_peft", [True, False], ids=["adapter", "whole"])
@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3"])
def test_deepspeed_trains_as_one_gpu_without_it(tiny_model_dir, tmp_path, on_one, zero, use_peft):
    n_gpus = min(len(GPUS), 2)
    options = PLAIN | {"use_peft": use_peft, "gradient_accumulation_steps": 4 // n_gpus, "output_dir": tmp_path / zero}
    argv = stage_flags("sft", tiny_model_dir, tmp_path, **options, deepspeed=ROOT / f"ds_configs/{zero}.json")
    launch("supervised_finetuning.py", argv, GPUS[:n_gpus], n_gpus)
    assert_close(left(tmp_path / zero), on_one("sft", use_peft=use_peft))


@needs_two
def test_a_model_that_is_split_over_gpus_trains_as_on_one(tiny_model_dir, tmp_path, on_one):
    options = PLAIN | {"gradient_accumulation_steps": 4, "device_map": "balanced", "output_dir": tmp_path / "split"}
    launch("supervised_finetuning.py", stage_flags("sft", tiny_model_dir, tmp_path, **options), GPUS[:2], 1)
    assert_close(left(tmp_path / "split"), on_one("sft"))


@needs_two
@pytest.mark.parametrize("stage", ["grpo", "ppo"])
def test_reinforcement_learning_on_two_gpus(tiny_model_dir, tmp_path, stage):
    sft = train_sft(tmp_path / "sft", tiny_model_dir, "--max_steps", "12")
    options = {"max_steps": 1, "torch_dtype": "float32", "gradient_accumulation_steps": 2}
    if stage == "ppo":
        argv = ppo_flags(sft, train_rm(tmp_path / "rm", sft), tmp_path, num_ppo_epochs=1, **options)
    else:
        argv = grpo_flags(sft, tmp_path, **options)
    launch(f"{RL_STAGES[stage]}.py", argv, GPUS[:2], 2)
    assert history(tmp_path / "out")[0]["policy/ratio"] == pytest.approx(1.0, abs=1e-3)


@needs_two
def test_a_teacher_on_the_second_gpu_teaches_as_beside_the_student(tiny_model_dir, adapter, tmp_path):
    for name, device in (("beside", None), ("second", "cuda:1")):
        options = {"teacher_device": device, "torch_dtype": "float32", "beta": 0.5, "max_steps": 1}
        argv = distillation_flags(tiny_model_dir, adapter, tmp_path, output_dir=tmp_path / name, **options)
        launch("distillation_training.py", argv, GPUS[:2], 1)
    (beside,), (second,) = (history(tmp_path / name) for name in ("beside", "second"))
    for figure in ("teacher/kl", "policy/loss", "policy/grad_norm"):
        assert second[figure] == pytest.approx(beside[figure], rel=1e-3), figure
