"""Families as they are shipped, and experts: runs in two processes, with ZeRO-2, and killed, are those of Qwen2."""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from stage_runs import ROOT, end_well, logged, stage_flags, start_stage, start_two_processes
from test_deepspeed import PLAIN, without_compiling
from test_reliability import WHOLE, assert_same_run, kill_again_and_again
from tiny_families import save_family

from medtune.training.checkpoints import BEST

FAMILIES = ["qwen3_5", "gemma4", "qwen3_moe"]


@pytest.fixture(params=FAMILIES)
def model(request, tiny_model_dir, tmp_path) -> Path:
    return save_family(request.param, tmp_path / "model", tiny_model_dir)


def sft_flags(model: Path, folder: Path, output_dir: str, **changes) -> list[str]:
    return stage_flags("sft", model, folder, output_dir=folder / output_dir, **changes)


@pytest.mark.slow
def test_two_processes_and_zero2_train_as_one_process(model, tmp_path):
    log = tmp_path / "log"
    end_well([start_stage("sft", sft_flags(model, tmp_path, "one", **PLAIN, gradient_accumulation_steps=4), log)], log)
    expected = logged(tmp_path / "one")
    wanted = load_file(tmp_path / "one" / BEST / "adapter_model.safetensors")
    zero2 = without_compiling(ROOT / "ds_configs/zero2.json", tmp_path)
    for name, options in {"plain": {}, "zero2": {"deepspeed": zero2}}.items():
        end_well(start_two_processes("sft", sft_flags(model, tmp_path, name, **PLAIN, **options), log), log)
        assert logged(tmp_path / name) == pytest.approx(expected, abs=1e-4)
        weights = load_file(tmp_path / name / BEST / "adapter_model.safetensors")
        assert weights.keys() == wanted.keys()
        assert all((weights[key] - wanted[key]).abs().max() < 2e-4 for key in wanted)


@pytest.mark.slow
def test_a_killed_run_goes_on(model, tmp_path):
    options = WHOLE | {"lora_dropout": None, "max_steps": 8}
    log = tmp_path / "whole.log"
    end_well([start_stage("sft", sft_flags(model, tmp_path, "whole", **options), log)], log)
    argv = sft_flags(model, tmp_path, "out", **options, resume_from_checkpoint=True)
    kill_again_and_again("sft", argv, tmp_path / "out", n_kills=2)
    assert_same_run(tmp_path / "out", tmp_path / "whole")
