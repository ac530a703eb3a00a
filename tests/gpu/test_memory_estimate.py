"""What scripts/estimate_run.py says of a run's memory, and what torch allocates in it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from build_tiny_model import write_tiny_model
from conftest import TEXTS
from stage_runs import ROOT, stage_flags, write_lines
from test_on_one_gpu import HALF, needs_bfloat16

# About 90 million weights: beside them a tiny model's batches would be all there is.
SHAPE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "qwen2"
    write_tiny_model(folder, TEXTS * 2, vocab_size=600, **SHAPE, **HEADS)
    return folder


@needs_bfloat16
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True},
        {"load_in_4bit": True},
        {"use_peft": False, "torch_dtype": "float32"},
        {"per_device_train_batch_size": 2},
    ],
    ids=str,
)
def test_the_estimate_is_what_torch_allocates(model, tmp_path, options):
    records = [{"question": f"{n}号病人头疼怎么办？", "answer": "多喝水，注意休息。" * 80} for n in range(32)]
    data = write_lines(tmp_path / "long/records.jsonl", records).parent
    run = {"per_device_train_batch_size": 8, "model_max_length": 1024, "max_steps": 2, "save_strategy": "no"}
    flags = stage_flags("sft", model, tmp_path, **HALF["bfloat16"] | run | {"train_file_dir": data} | options)
    estimate = [sys.executable, "scripts/estimate_run.py", "--gpus", "1", "--json", "supervised_finetuning.py", *flags]
    said = subprocess.run(estimate, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    subprocess.run([sys.executable, "supervised_finetuning.py", *flags], cwd=ROOT, check=True)
    measured = json.loads((tmp_path / "out/train_results.json").read_text())["peak_memory_gib"]
    assert json.loads(said)["allocated_gib"] == pytest.approx(measured, rel=0.1)
