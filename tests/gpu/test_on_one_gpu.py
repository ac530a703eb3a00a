"""What only a GPU shows: half precision, FlashAttention, quantized weights, torch.compile, memory that is full."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from stage_runs import ROOT, logged, stage_flags, write_lines

import dpo_training
import pretraining
import reward_modeling
import supervised_finetuning
from medtune.machine.computing import check_computing
from medtune.machine.findings import WRONG
from medtune.models.loading import load_base_model
from medtune.training.checkpoints import BEST

MAINS = {
    "pt": pretraining.main,
    "sft": supervised_finetuning.main,
    "rm": reward_modeling.main,
    "dpo": dpo_training.main,
}
FLOAT32 = {"torch_dtype": "float32", "bf16": False, "fp16": False}
HALF = {
    "bfloat16": {"torch_dtype": "bfloat16", "bf16": True},
    "float16": {"torch_dtype": "float16", "bf16": False, "fp16": True},
}
# Twelve steps that learn, without dropout.
LEARNING = {"max_steps": 12, "save_strategy": "no", "lora_dropout": 0, "learning_rate": 2e-3}
# Pairs would be told apart completely, and losses near 0 compare with nothing.
FOR_PAIRS = {"pt": {}, "sft": {}, "rm": {"learning_rate": 2e-4}, "dpo": {"learning_rate": 1e-4}}


HAS_BFLOAT16 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
needs_bfloat16 = pytest.mark.skipif(not HAS_BFLOAT16, reason="there is no GPU with bfloat16")
HALVES = [pytest.param("bfloat16", marks=needs_bfloat16), "float16"]


@pytest.fixture
def losses(tiny_model_dir, tmp_path):
    """A function that trains a stage with these options and returns its losses, one a step."""

    def train(stage: str, name: str, **options) -> list[float]:
        options = LEARNING | FOR_PAIRS[stage] | options
        MAINS[stage](stage_flags(stage, tiny_model_dir, tmp_path, **options, output_dir=tmp_path / name))
        return list(logged(tmp_path / name).values())

    return train


def last(values: list[float]) -> float:
    """The mean of the last four, which hangs less on one batch."""
    return sum(values[-4:]) / 4


def test_the_gpu_computes_right():
    assert [str(finding) for finding in check_computing(["cuda:0"]) if finding.grade == WRONG] == []


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("stage", sorted(MAINS))
def test_in_float32_the_losses_are_those_of_the_cpu(losses, stage):
    on_gpu = losses(stage, "gpu", **FLOAT32)
    on_cpu = losses(stage, "cpu", **FLOAT32, use_cpu=True, cpu_bf16=False)
    assert on_gpu == pytest.approx(on_cpu, rel=5e-3)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("stage", sorted(MAINS))
def test_in_half_precision_it_learns_as_in_float32(losses, stage, dtype):
    exact, half = losses(stage, "exact", **FLOAT32), losses(stage, "half", **HALF[dtype])
    assert half[0] == pytest.approx(exact[0], rel=0.02)
    assert last(half) == pytest.approx(last(exact), rel=0.05)
    assert last(half) < half[0]


@pytest.mark.parametrize("dtype", HALVES)
def test_all_weights_learn_in_half_precision(losses, dtype):
    trained = losses("sft", "whole", use_peft=False, learning_rate=1e-3, **HALF[dtype] | {"torch_dtype": "float32"})
    assert last(trained) < 0.8 * trained[0]


@pytest.mark.parametrize("dtype", HALVES)
def test_checkpointing_changes_nothing(losses, dtype):
    plain, checkpointed = (losses("sft", str(on), gradient_checkpointing=on, **HALF[dtype]) for on in (False, True))
    assert checkpointed == pytest.approx(plain, rel=0.01)


# ---------------------------------------------------------------- attention and compiled layers


@needs_bfloat16
@pytest.mark.skipif(not importlib.util.find_spec("flash_attn"), reason="flash-attn is not installed")
def test_flash_attention_is_sdpa(losses, tiny_model_dir):
    models = [
        load_base_model(str(tiny_model_dir), torch_dtype="bfloat16", flash_attn=flash).to("cuda").eval()
        for flash in (False, True)
    ]
    assert [model.config._attn_implementation.startswith("flash") for model in models] == [False, True]
    ids = torch.arange(7, 87).reshape(2, 40).cuda()
    mask = torch.ones_like(ids)
    mask[0, 30:] = 0
    with torch.no_grad():
        by_sdpa, by_flash = (model(input_ids=ids, attention_mask=mask).logits.float()[mask.bool()] for model in models)
    assert (by_flash - by_sdpa).norm() < 0.02 * by_sdpa.norm()
    for stage, options in (("sft", {}), ("sft", {"packing": True, "model_max_length": 128}), ("dpo", {})):
        half = HALF["bfloat16"] | options
        plain, flash = (
            losses(stage, f"{stage}-flash-{on}-{len(options)}", flash_attn=on, **half) for on in (False, True)
        )
        assert flash == pytest.approx(plain, rel=0.02)


@needs_bfloat16
def test_packed_rows_learn_as_padded_ones_do(losses):
    packed = losses("sft", "packed", packing=True, model_max_length=128, **HALF["bfloat16"])
    assert last(packed) < packed[0]


@needs_bfloat16
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_compiled_layers_compute_the_same(losses, stage):
    plain, compiled = (losses(stage, f"compiled-{on}", torch_compile=on, **HALF["bfloat16"]) for on in (False, True))
    assert compiled == pytest.approx(plain, rel=0.02)


# ---------------------------------------------------------------- quantized weights, optimizers


@needs_bfloat16
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
@pytest.mark.parametrize("stage", sorted(MAINS))
def test_on_quantized_weights_it_learns_as_on_plain_ones(losses, tmp_path, stage, bits):
    plain, quantized = (
        losses(stage, "plain", **HALF["bfloat16"]),
        losses(stage, "q", **HALF["bfloat16"], **{bits: True}),
    )
    assert last(quantized) == pytest.approx(last(plain), rel=0.1)
    assert last(quantized) < quantized[0]
    weights = load_file(tmp_path / "q" / BEST / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in weights.items() if "lora_B" in name)


@needs_bfloat16
@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "adamw_torch_fused"])
def test_other_optimizers_learn_as_adamw(losses, optim):
    plain, other = (losses("sft", name, optim=name, **HALF["bfloat16"]) for name in ("adamw_torch", optim))
    assert last(other) == pytest.approx(last(plain), rel=0.05)


# ---------------------------------------------------------------- memory


# 150 MiB for a model of three and batches of hundreds.
LITTLE_MEMORY = """
import sys, torch
torch.cuda.set_per_process_memory_fraction(150 * 2**20 / torch.cuda.get_device_properties(0).total_memory)
from medtune.errors import run_script
import supervised_finetuning
run_script(lambda: supervised_finetuning.main(sys.argv[1:]))
"""


def test_memory_that_is_full_is_one_line_with_what_to_do(tiny_model_dir, tmp_path):
    records = [{"question": f"{n}号病人头疼怎么办？", "answer": "多喝水，注意休息。" * 80} for n in range(128)]
    data = write_lines(tmp_path / "long/records.jsonl", records).parent
    options = {"train_file_dir": data, "per_device_train_batch_size": 64, "model_max_length": 1024}
    argv = stage_flags("sft", tiny_model_dir, tmp_path, **options)
    command = [sys.executable, "-c", LITTLE_MEMORY, *argv]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 2, run.stderr
    assert "error: out of memory at step 1; in this order: --per_device_train_batch_size 32 " in run.stderr
    assert "--gradient_checkpointing True; --load_in_4bit True; --model_max_length" in run.stderr
    assert "Traceback" not in run.stderr


def test_checkpointing_saves_memory(losses):
    peaks = []
    for on in (False, True):
        torch.cuda.reset_peak_memory_stats()
        losses("sft", f"memory-{on}", gradient_checkpointing=on, per_device_train_batch_size=16, max_steps=2)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < peaks[0]


def test_a_model_goes_where_device_map_auto_says(tiny_model_dir):
    model = load_base_model(str(tiny_model_dir), device_map="auto", load_in_4bit=True)
    assert {parameter.device for parameter in model.parameters()} == {torch.device("cuda", 0)}
