"""Two processes, with DeepSpeed and without: they train as one process does, and leave what the next stage loads."""

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stage_runs import ROOT, STAGES, end_well, logged, stage_flags, start_stage, start_two_processes
from tiny_families import save_tiny_model

from medtune.models.adapters import load_with_adapter
from medtune.models.loading import load_base_model
from medtune.models.reward_models import load_reward_model
from medtune.training.checkpoints import BEST

CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
# In float32, whose sums the stages take in another order.
PLAIN = {"lora_dropout": 0, "max_grad_norm": 0, "max_steps": 3, "save_strategy": "no"}


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


@pytest.fixture(scope="module")
def in_one_process(tiny_model_dir, tmp_path_factory) -> Callable[[str, bool], Path]:
    """A function that trains a stage in one process with twice the accumulation; its folder, with data and out."""

    @cache
    def train(stage: str, use_peft: bool) -> Path:
        folder = tmp_path_factory.mktemp(f"{stage}-{use_peft}")
        argv = stage_flags(stage, tiny_model_dir, folder, **PLAIN, use_peft=use_peft, gradient_accumulation_steps=4)
        end_well([start_stage(stage, argv, folder / "log")], folder / "log")
        return folder

    return train


def loaded(stage: str, base: Path, best: Path, use_peft: bool) -> torch.nn.Module:
    """What a run left, as the next stage loads it."""
    if stage == "rm":
        return load_reward_model(str(base) if use_peft else str(best), str(best) if use_peft else None)
    return load_with_adapter(str(base), str(best)) if use_peft else load_base_model(str(best))


CASES = [(stage, config) for stage in sorted(STAGES) for config in ("plain", "zero2", "zero3")]


@pytest.mark.slow
@pytest.mark.parametrize("use_peft", [True, False], ids=["adapter", "full"])
@pytest.mark.parametrize(("stage", "config"), [*CASES, ("sft", "zero1"), ("sft", "zero3_offload")])
def test_two_processes_train_as_one_with_twice_the_accumulation(
    tiny_model_dir, tmp_path, in_one_process, stage, config, use_peft
):
    one, two = in_one_process(stage, use_peft), tmp_path / "two"
    argv = stage_flags(stage, tiny_model_dir, one, **PLAIN, use_peft=use_peft, output_dir=two)
    if config != "plain":
        argv += ["--deepspeed", str(without_compiling(ROOT / f"ds_configs/{config}.json", tmp_path))]
    end_well(start_two_processes(stage, argv, tmp_path / "log"), tmp_path / "log")
    log = (tmp_path / "log").read_text()
    assert "2 process(es)" in log
    expected, found = logged(one / "out"), logged(two)
    assert found.keys() == expected.keys()
    assert list(found.values()) == pytest.approx(list(expected.values()), abs=1e-5)
    best = "adapter_model.safetensors" if use_peft else "model.safetensors"
    weights, wanted = (load_file(folder / BEST / best) for folder in (two, one / "out"))
    # DeepSpeed hands over a head that shares the embedding's weights as a tensor of its own.
    assert weights.keys() - wanted.keys() <= {"lm_head.weight"}
    for name, tensor in wanted.items():
        assert (weights[name] - tensor).abs().max() < 1e-4, name
    ids = torch.arange(100, 120)[None]
    models = [loaded(stage, tiny_model_dir, folder / BEST, use_peft).eval() for folder in (two, one / "out")]
    with torch.no_grad():
        torch.testing.assert_close(*(model(ids).logits for model in models), atol=1e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["plain", "zero3"])
def test_documents_that_see_each_other_stop_every_process(tiny_model_dir, tmp_path, config):
    options, log = {"padding_free": False}, tmp_path / "log"
    if config != "plain":
        options["deepspeed"] = without_compiling(ROOT / f"ds_configs/{config}.json", tmp_path)
    model = save_tiny_model("opt", tmp_path / "opt", tiny_model_dir)
    processes = start_two_processes("pt", stage_flags("pt", model, tmp_path, **options), log)
    for process in processes:
        process.join(500)
    assert [process.exitcode for process in processes] == [2, 2], log.read_text()[-4000:]
    lines = [line for line in log.read_text().splitlines() if line.startswith("error:")]
    assert len(set(lines)) == 1
    assert lines[0].startswith("error: the documents of a row see each other in this model (opt: ")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["plain", "zero2", "zero3"])
def test_a_signal_to_one_of_two_processes_costs_nothing(tiny_model_dir, tmp_path, config):
    options = {
        "max_steps": 8,
        "logging_steps": 3,
        "save_steps": 100,
        "lora_dropout": 0.2,
        "resume_from_checkpoint": True,
    }
    if config != "plain":
        options["deepspeed"] = without_compiling(ROOT / f"ds_configs/{config}.json", tmp_path)
    argv, log = stage_flags("sft", tiny_model_dir, tmp_path, **options), tmp_path / "log"
    end_well(start_two_processes("sft", [*argv, "--output_dir", str(tmp_path / "whole")], log), log)
    stopped = start_two_processes("sft", argv, log, SIGTERM_AT_STEP="4")
    for process in stopped:
        process.join(500)
    assert [process.exitcode for process in stopped] == [143, 143], log.read_text()[-4000:]
    step = 5 if config != "plain" else 4  # DeepSpeed ends the step under way
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    end_well(start_two_processes("sft", argv, log), log)
    assert logged(tmp_path / "out") == pytest.approx(logged(tmp_path / "whole"), abs=1e-6)
    weights, wanted = (load_file(tmp_path / run / BEST / "adapter_model.safetensors") for run in ("out", "whole"))
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
