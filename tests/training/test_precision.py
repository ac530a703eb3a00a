"""--cpu_bf16: where the frozen base is in bfloat16 on a CPU, that it computes so, and what a resumed run keeps."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from stage_runs import load_for_training, logged, stage_flags

import dpo_training
import pretraining
import reward_modeling
import supervised_finetuning
from medtune.arguments import LoraArguments, ModelArguments
from medtune.errors import UserError
from medtune.models.logps import SparseHead
from medtune.training import precision
from medtune.training.checkpoints import BEST, MANIFEST
from medtune.training.precision import CPU_BF16, base_dtype, bfloat16_speed, has_bfloat16_base

MAINS = {
    "pt": pretraining.main,
    "sft": supervised_finetuning.main,
    "rm": reward_modeling.main,
    "dpo": dpo_training.main,
}


@pytest.fixture
def cpu(monkeypatch):
    """Pretend to be on a CPU with or without bfloat16, so many times as fast; the tiny model counts as wide."""

    def pretend(has_it: bool = True, speed: float = 4.2, smallest_hidden: int = 128) -> None:
        monkeypatch.setattr(precision, "has_bfloat16", lambda: has_it)
        monkeypatch.setattr(precision, "bfloat16_speed", lambda hidden_size: speed)
        monkeypatch.setattr(precision, "SMALLEST_HIDDEN", smallest_hidden)

    return pretend


def decide(model: Path, cpu_bf16: str = "auto", given: str = "", use_cpu: bool = True, **lora) -> str:
    """The type of the base in a new run."""
    training_args = SimpleNamespace(use_cpu=use_cpu, process_index=0, world_size=1)
    model_args = ModelArguments(str(model), cpu_bf16=cpu_bf16, torch_dtype="float32" if use_cpu else "auto")
    words = given.split()
    flags = dict(zip(words[::2], words[1::2], strict=True))
    return base_dtype(model_args, LoraArguments(**lora), training_args, flags, None)


# ---------------------------------------------------------------- the decision


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, "bfloat16"),
        ({"speed": precision.LEAST_SPEED - 0.1}, "float32"),
        ({"has_it": False}, "float32"),
        ({"smallest_hidden": 129}, "float32"),
    ],
)
def test_auto_is_bfloat16_where_it_is_there_and_faster(cpu, tiny_model_dir, changes, dtype):
    cpu(**changes)
    assert decide(tiny_model_dir) == dtype


CONTRADICTIONS = [
    ("--torch_dtype float32", {}, "--torch_dtype float32"),
    ("--bf16 False", {}, "--bf16 False"),
    ("", {"use_peft": False}, "--use_peft False, which trains full weights"),
    ("", {"modules_to_save": "lm_head"}, "an adapter that holds all of lm_head, which bfloat16 would round"),
    ("", {"target_modules": "q_proj,embed_tokens"}, "an adapter that holds all of embed_tokens, which .* round"),
]


@pytest.mark.parametrize(("given", "lora", "obstacle"), CONTRADICTIONS)
def test_what_asks_for_float32_keeps_it(cpu, tiny_model_dir, given, lora, obstacle):
    cpu()
    assert decide(tiny_model_dir, given=given, **lora) == "float32"
    with pytest.raises(UserError, match=f"^--cpu_bf16 True: not with {obstacle}; leave one of them out$"):
        decide(tiny_model_dir, "True", given, **lora)


def test_zero_3_keeps_float32(cpu, tiny_model_dir, monkeypatch):
    """It loads the weights in float32, whatever type is asked for."""
    cpu()
    monkeypatch.setattr(precision, "is_deepspeed_zero3_enabled", lambda: True)
    assert decide(tiny_model_dir) == "float32"
    with pytest.raises(UserError, match="--cpu_bf16 True: not with ZeRO-3, which loads the base in float32 on a CPU"):
        decide(tiny_model_dir, "True")


def test_the_guides_flags_for_gpus_leave_it_to_the_cpu(cpu, tiny_model_dir):
    cpu()
    assert decide(tiny_model_dir, given="--torch_dtype bfloat16 --bf16 True") == "bfloat16"


def test_it_is_said_in_one_line(cpu, tiny_model_dir, capfd):
    precision.logger.remove()
    precision.logger.add(lambda line: print(line, end=""), format="{message}")
    cpu()
    decide(tiny_model_dir)
    cpu(speed=0.6)
    decide(tiny_model_dir)
    cpu(has_it=False)
    decide(tiny_model_dir)
    decide(tiny_model_dir, "True")
    assert decide(tiny_model_dir, "True", use_cpu=False) == "auto"
    base = "the frozen base is in bfloat16"
    assert capfd.readouterr().out.splitlines() == [
        f"--cpu_bf16 auto: {base} (matrix products are 4.2 times as fast as in float32), the adapter in float32",
        "--cpu_bf16 auto: float32, since in this CPU's bfloat16 matrix products are 0.6 times as fast as in float32",
        f"--cpu_bf16 True: {base} (as requested, slowly: this CPU emulates it), the adapter in float32",
        "--cpu_bf16: True, for a CPU; on this GPU --torch_dtype and --bf16 decide",
    ]


@pytest.mark.parametrize(
    ("has_it", "speed", "flag"), [(True, 4.2, "autocast"), (True, 1.4, "False"), (False, 9, "False")]
)
def test_full_weights_get_autocast_where_it_is_there_and_faster(cpu, has_it, speed, flag):
    cpu(has_it, speed)
    assert precision.autocast_where_faster(256) == flag


def test_the_speed_is_measured():
    assert 0.001 < bfloat16_speed(64) < 1000


# ---------------------------------------------------------------- what is computed


def test_the_base_computes_in_bfloat16_and_all_that_is_trained_in_float32(tiny_model_dir):
    model = load_for_training(str(tiny_model_dir), use_peft=True, torch_dtype="bfloat16")
    assert has_bfloat16_base(model)
    assert {weights.dtype for weights in model.parameters() if weights.requires_grad} == {torch.float32}
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "base_layer")}
    seen = set()
    for layer in layers.values():
        layer.register_forward_hook(lambda _, inputs, output: seen.update({inputs[0].dtype, output.dtype}))
    ids = torch.arange(3, 35)[None]
    (logps,) = SparseHead(model).logps(model, ids, torch.ones_like(ids), torch.ones(1, 31, dtype=torch.bool))
    assert seen == {torch.bfloat16}
    assert logps.dtype == torch.float32
    logps.mean().backward()
    assert all(weights.grad.dtype == torch.float32 for weights in model.parameters() if weights.requires_grad)


@pytest.mark.parametrize("stage", sorted(MAINS))
def test_a_stage_learns_as_in_float32(tiny_model_dir, tmp_path, capfd, stage):
    """With the reference checked before DPO's first step; pairs are learned slowly, or their loss would be near 0."""
    learning_rate = 1e-4 if stage in ("rm", "dpo") else 1e-3
    last = {}
    for asked in ("True", "False"):
        out, changes = tmp_path / asked, {"max_steps": 8, "save_strategy": "no", "lora_dropout": 0}
        changes |= {"cpu_bf16": asked, "learning_rate": learning_rate, "output_dir": out}
        MAINS[stage](stage_flags(stage, tiny_model_dir, tmp_path, **changes))
        losses = logged(out)
        last[asked] = sum(losses[step] for step in range(5, 9)) / 4
        log = capfd.readouterr().err
        assert ("precision               base in bfloat16, adapter and loss in float32" in log) == (asked == "True")
        weights = load_file(out / BEST / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        assert any((tensor != tensor.bfloat16().float()).any() for tensor in weights.values())
    assert last["True"] == pytest.approx(last["False"], rel=0.01)
    assert last["True"] != last["False"]


def test_autocast_trains_full_weights_in_float32_with_products_in_bfloat16(tiny_model_dir, tmp_path, capfd):
    """And a resumed run keeps it, or is refused."""
    changes = {"use_peft": False, "max_steps": 4}
    losses = {}
    for asked in ("autocast", "False"):
        folder = tmp_path / asked
        folder.mkdir()
        pretraining.main(stage_flags("pt", tiny_model_dir, folder, cpu_bf16=asked, **changes))
        losses[asked] = logged(folder / "out")
    log = capfd.readouterr().err
    assert "no CUDA device: float32 weights, products in bfloat16 on the CPU" in log
    assert "precision               bfloat16 autocast" in log
    assert losses["autocast"] != losses["False"]
    assert losses["autocast"] == pytest.approx(losses["False"], rel=0.01)
    out = tmp_path / "autocast/out"
    weights = load_file(out / BEST / "model.safetensors").values()
    assert all(tensor.dtype == torch.float32 for tensor in weights)
    assert any((tensor != tensor.bfloat16().float()).any() for tensor in weights)

    shutil.rmtree(out / "checkpoint-4")
    (out / "loss.png").unlink()
    goes_on = {"resume_from_checkpoint": True} | changes
    with pytest.raises(UserError, match=r"^--cpu_bf16 False: the run in .* started with autocast, .*give .* autocast"):
        pretraining.main(stage_flags("pt", tiny_model_dir, tmp_path / "autocast", **goes_on))
    pretraining.main(stage_flags("pt", tiny_model_dir, tmp_path / "autocast", cpu_bf16="autocast", **goes_on))
    assert logged(out) == losses["autocast"]


# ---------------------------------------------------------------- a resumed run


@pytest.fixture(scope="module")
def bfloat16_run(tiny_model_dir, tmp_path_factory) -> Path:
    """Its folder, with the run in `out`: four steps, a checkpoint every two."""
    folder = tmp_path_factory.mktemp("bfloat16")
    supervised_finetuning.main(stage_flags("sft", tiny_model_dir, folder, cpu_bf16="True"))
    return folder


@pytest.fixture
def resume(bfloat16_run, tiny_model_dir, tmp_path):
    """A function that goes on from the second step, as if the run had been interrupted there."""
    folder = tmp_path / "run"
    shutil.copytree(bfloat16_run, folder)
    shutil.rmtree(folder / "out/checkpoint-4")
    (folder / "out/loss.png").unlink()

    def go_on(**changes) -> Path:
        changes = {"resume_from_checkpoint": True} | changes
        supervised_finetuning.main(stage_flags("sft", tiny_model_dir, folder, **changes))
        return folder / "out"

    go_on.checkpoint = folder / "out/checkpoint-2"
    return go_on


def test_it_keeps_bfloat16_on_another_cpu(cpu, resume, bfloat16_run, capfd):
    cpu(has_it=False)
    out = resume()
    line = "--cpu_bf16 auto: the frozen base is in bfloat16 (as the run began, slowly: this CPU emulates it)"
    assert line in capfd.readouterr().err
    assert logged(out) == logged(bfloat16_run / "out")


@pytest.mark.parametrize("flag", ["cpu_bf16", "bf16"])
def test_it_is_not_continued_in_float32(resume, flag):
    with pytest.raises(UserError, match=r"^--cpu_bf16 False: the run in .* was started with True, and .* leave out"):
        resume(**{flag: False})


def test_a_run_of_an_older_version_stays_in_float32(cpu, resume, capfd):
    cpu()
    state_file = resume.checkpoint / "trainer_state.json"
    state = json.loads(state_file.read_text())
    assert state["stateful_callbacks"]["CheckpointKeeper"]["attributes"].pop(CPU_BF16) is True
    state_file.write_text(json.dumps(state))
    (resume.checkpoint / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"^--cpu_bf16 True: the run in .* was started with False"):
        resume(cpu_bf16=True)
    capfd.readouterr()
    resume()
    assert "bfloat16" not in capfd.readouterr().err
