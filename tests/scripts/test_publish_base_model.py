"""The base model's sittings and their card: `scripts/train_base_model.sh` and `scripts/publish_base_model.py`."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from publish_base_model import main
from test_launchers import known_flags, pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

from medtune.errors import UserError
from medtune.models.lineage import Lineage

ROOT = Path(__file__).resolve().parents[2]
FLAGS = {"--learning_rate": "2e-3", "--block_size": "512", "--output_dir": "outputs-base-1"}


@pytest.fixture
def run(tmp_path, tiny_model_dir) -> Path:
    """What a sitting leaves: 60 steps of 8,192 tokens, at 1,000 and at 2,000 tokens a second."""
    folder = tmp_path / "outputs-base-1"
    shutil.copytree(tiny_model_dir, folder / "checkpoint-best")
    Lineage("untrained", None, "pt", "", "corpus", 64, 600, flags=FLAGS).save(folder / "checkpoint-best")
    logs = [
        {"step": 20, "loss": 5.0, "tokens_per_second": 1000.0},
        {"step": 40, "eval_loss": 4.5},
        {"step": 60, "loss": 4.0, "tokens_per_second": 2000.0},
    ]
    files = {
        "trainer_state.json": {"global_step": 60, "log_history": logs},
        "eval_results.json": {"eval_loss": 4.25, "eval_bits_per_byte": 1.5},
        "evaluation/metrics.json": {
            "metrics": {"questions.jsonl": {"models": {"base": {"n": 200, "named": {"value": 0.105}}}}}
        },
    }
    (folder / "evaluation").mkdir()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "documents.jsonl").write_text('{"text": "头痛"}\n', encoding="utf-8")
    return folder


def publish(run: Path, sitting: int) -> Path:
    published, corpus = run.parent / "base_model", run.parent / "documents.jsonl"
    flags = [*("--run", run), *("--sitting", sitting), *("--tokens_per_step", 8192), *("--corpus", corpus)]
    main([*map(str, flags), "--output_dir", str(published)])
    return published


def test_a_sitting_is_published_in_bfloat16_with_how_it_ran(run):
    published = publish(run, 1)
    model, trained = (AutoModelForCausalLM.from_pretrained(path) for path in (published, run / "checkpoint-best"))
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, trained.lm_head.weight.bfloat16())
    assert AutoTokenizer.from_pretrained(published).chat_template
    assert not (published / "lineage.json").exists()  # a base model of its own
    (record,) = json.loads((published / "sittings.json").read_text(encoding="utf-8"))
    assert (record["steps"], record["tokens"]) == (60, 60 * 8192)
    assert record["hours"] == round((20 * 8192 / 1000 + 40 * 8192 / 2000) / 3600, 2)
    assert record["corpus_sha256"] == hashlib.sha256('{"text": "头痛"}\n'.encode()).hexdigest()
    assert record["flags"] == {"--learning_rate": "2e-3", "--block_size": "512"}
    card = (published / "README.md").read_text(encoding="utf-8")
    assert "names the right condition in 0.105 of 200 answers" in " ".join(card.split())
    assert "| 1 | 60 | 491,520 | 0.09 | 4.0000 | 4.2500 | 1.5000 |" in card
    assert "- 高血压患者日常要注意 | " in card


def test_a_later_sitting_is_added_and_one_that_is_done_again_takes_its_place(run):
    publish(run, 1)
    publish(run, 2)
    published = publish(run, 2)
    records = json.loads((published / "sittings.json").read_text(encoding="utf-8"))
    assert [record["sitting"] for record in records] == [1, 2]
    with pytest.raises(UserError, match=r"--sitting 4: .*sittings.json does not hold the sittings before it"):
        publish(run, 4)


def test_an_unfinished_sitting_is_refused(run):
    (run / "eval_results.json").unlink()
    with pytest.raises(UserError, match=r"no .*eval_results.json; let scripts/train_base_model.sh finish"):
        publish(run, 1)


# ---------------------------------------------------------------- the launcher

STAND_IN = """
import json, sys
if sys.argv[1] == "-c":
    sys.exit(print("autocast"))  # the question which precision is faster
with open("calls.jsonl", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
"""


def sit(tmp_path: Path, **variables: str) -> list[tuple[str, dict[str, str]]]:
    """Script and flags of each call of the launcher."""
    (tmp_path / "scripts").mkdir(exist_ok=True)
    shutil.copy(ROOT / "scripts/train_base_model.sh", tmp_path / "scripts")
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "python").write_text(f'#!/usr/bin/env bash\nexec {shlex.quote(sys.executable)} stand_in.py "$@"\n')
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "calls.jsonl").unlink(missing_ok=True)
    kept = {name: value for name, value in os.environ.items() if name != "N_PROCESSES"}
    environment = kept | {"PYTHON": str(tmp_path / "python")} | variables
    launcher = ["bash", tmp_path / "scripts/train_base_model.sh"]
    subprocess.run(launcher, env=environment, check=True, stdin=subprocess.DEVNULL)
    calls = []
    for line in (tmp_path / "calls.jsonl").read_text().splitlines():
        words = json.loads(line)
        at = next(index for index, word in enumerate(words) if word.endswith(".py"))
        calls.append((words[at], dict(pairs(words[at + 1 :]))))
    return calls


def test_the_first_sitting_begins_with_random_weights_and_a_later_one_with_the_published(tmp_path):
    calls = sit(tmp_path)
    assert [script for script, _ in calls] == [
        *("scripts/build_sample_data.py", "scripts/build_tiny_model.py", "pretraining.py"),
        *("scripts/evaluate_model.py", "scripts/publish_base_model.py"),
    ]
    for script, flags in calls:
        assert not {f"--{flag}" for flag in flags} - known_flags(script), script
    of = dict(calls)
    untrained = of["scripts/build_tiny_model.py"]["output_dir"]
    assert (untrained, of["pretraining.py"]["model_name_or_path"]) == ("outputs-base-1-untrained", untrained)
    assert dict(sit(tmp_path, OUTPUT="other/"))["pretraining.py"]["model_name_or_path"] == "other-untrained"
    for variables in ({"SITTING": "2"}, {"STEPS": "399"}):  # nothing is published; no room for warm-up and decay
        with pytest.raises(subprocess.CalledProcessError, match="exit status 2"):
            sit(tmp_path, **variables)
        assert not (tmp_path / "calls.jsonl").exists()
    (tmp_path / "base_model").mkdir()
    (tmp_path / "base_model/config.json").write_text("{}")
    later = sit(tmp_path, SITTING="2", N_PROCESSES="1")
    assert [script for script, _ in later] == [script for script, _ in calls if "tiny" not in script]
    first, second = of["pretraining.py"], dict(later)["pretraining.py"]
    assert second["model_name_or_path"] == of["scripts/publish_base_model.py"]["output_dir"]
    assert (first["seed"], first["data_seed"]) == (second["seed"], "1")
    assert second["data_seed"] == "2"
    assert first["cpu_bf16"] == "autocast"
    assert (first["gradient_accumulation_steps"], second["gradient_accumulation_steps"]) == ("1", "2")
