"""DeepSpeed on the CPU: two processes with any ZeRO stage train as one process does, and leave models that load."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from stage_runs import ROOT, STAGES, logged, stage_flags
from transformers import AutoModelForCausalLM

from checkpoints import BEST

CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
# In float32, whose sums the stages take in another order.
PLAIN = {"lora_dropout": 0, "max_grad_norm": 0, "max_steps": 3, "save_strategy": "no"}


def launch(stage: str, argv: list[str], n_processes: int) -> str:
    """Run a stage as its launcher does; its log."""
    command = [sys.executable, "-m", "scripts.launch_processes", "--nproc_per_node", str(n_processes)]
    finished = subprocess.run(
        [*command, f"{STAGES[stage]}.py", *argv], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return finished.stderr


def without_compiling(config: Path, folder: Path) -> Path:
    """The configuration with torch's optimizer instead of one that DeepSpeed compiles, for a minute, for CPUs."""
    settings = json.loads(config.read_text()) | {"zero_force_ds_cpu_optimizer": False}
    for offload in ("offload_optimizer", "offload_param"):
        if offload in settings["zero_optimization"]:
            settings["zero_optimization"][offload]["pin_memory"] = False  # of GPUs
    copy = folder / config.name
    copy.write_text(json.dumps(settings))
    return copy


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_configurations_leave_everything_to_the_flags(config):
    settings = json.loads(config.read_text())
    assert settings["zero_optimization"]["stage"] == int(re.search(r"\d", config.stem)[0])
    assert not {"optimizer", "scheduler"} & settings.keys()
    for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        assert settings[name] == "auto"
    assert settings["bf16"]["enabled"] == settings["fp16"]["enabled"] == "auto"


def test_a_file_for_every_zero_stage():
    assert [config.stem for config in CONFIGS] == ["zero1", "zero2", "zero3", "zero3_offload"]


@pytest.mark.slow
@pytest.mark.parametrize("use_peft", [True, False], ids=["adapter", "full"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_two_processes_train_as_one_with_twice_the_accumulation(tiny_model_dir, tmp_path, config, use_peft):
    options = PLAIN | {"use_peft": use_peft}
    one = stage_flags("sft", tiny_model_dir, tmp_path, **options, gradient_accumulation_steps=4)
    launch("sft", one, 1)
    two = stage_flags("sft", tiny_model_dir, tmp_path, **options, output_dir=tmp_path / "two")
    launch("sft", [*two, "--deepspeed", str(without_compiling(config, tmp_path))], 2)
    expected, found = logged(tmp_path / "out"), logged(tmp_path / "two")
    assert found.keys() == expected.keys()
    assert list(found.values()) == pytest.approx(list(expected.values()), abs=1e-5)
    best = "adapter_model.safetensors" if use_peft else "model.safetensors"
    weights, wanted = (load_file(folder / BEST / best) for folder in (tmp_path / "two", tmp_path / "out"))
    # DeepSpeed hands over a head that shares the embedding's weights as a tensor of its own.
    assert weights.keys() - wanted.keys() <= {"lm_head.weight"}
    for name, tensor in wanted.items():
        assert (weights[name] - tensor).abs().max() < 1e-4
    if not use_peft:
        AutoModelForCausalLM.from_pretrained(tmp_path / "two" / BEST)


@pytest.mark.slow
@pytest.mark.parametrize("stage", sorted(set(STAGES) - {"sft"}))
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_every_stage_trains_with_zero(tiny_model_dir, tmp_path, stage, zero):
    options = PLAIN | ({"loss_type": "sigmoid"} if stage == "dpo" else {})
    launch(stage, stage_flags(stage, tiny_model_dir, tmp_path, **options, gradient_accumulation_steps=4), 1)
    two = stage_flags(stage, tiny_model_dir, tmp_path, **options, output_dir=tmp_path / "two")
    config = without_compiling(ROOT / f"ds_configs/{zero}.json", tmp_path)
    launch(stage, [*two, "--deepspeed", str(config)], 2)
    assert list(logged(tmp_path / "two").values()) == pytest.approx(list(logged(tmp_path / "out").values()), abs=1e-5)


@pytest.mark.slow
def test_a_stopped_run_goes_on(tiny_model_dir, tmp_path):
    config = without_compiling(ROOT / "ds_configs/zero2.json", tmp_path)
    options = {"max_steps": 6, "save_steps": 3, "lr_scheduler_type": "constant", "deepspeed": config}
    whole = stage_flags("sft", tiny_model_dir, tmp_path, **options, output_dir=tmp_path / "whole")
    launch("sft", whole, 2)
    launch("sft", stage_flags("sft", tiny_model_dir, tmp_path, **options | {"max_steps": 3}), 2)
    (tmp_path / "out/loss.png").unlink()
    log = launch("sft", stage_flags("sft", tiny_model_dir, tmp_path, **options, resume_from_checkpoint=True), 2)
    assert "resuming from" in log
    assert logged(tmp_path / "out") == pytest.approx(logged(tmp_path / "whole"), abs=1e-6)
