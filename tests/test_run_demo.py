"""run_demo.sh, with a stand-in for Python that writes down its calls and leaves what a stage leaves."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_launchers import known_flags, pairs

ROOT = Path(__file__).resolve().parents[1]

STAND_IN = """
import json, os, sys
from pathlib import Path

words = sys.argv[1:]
if os.environ["CUDA_VISIBLE_DEVICES"]:
    sys.exit("on the GPUs")
if words[:2] == ["-m", "medtune.devices"]:
    sys.exit()
if words[0] == "-c":  # how fast bfloat16 is
    print(os.environ.get("PRECISION", "False"))
    sys.exit()
with open("calls.jsonl", "a") as file:
    file.write(json.dumps(words) + "\\n")
at = next(index for index, word in enumerate(words) if word.endswith(".py"))
script, flags = words[at], dict(zip(words[at + 1 :], words[at + 2 :]))
if os.environ.get("FAIL_AT") == script:
    sys.exit(3)
best = Path(flags.get("--output_dir", "."), "checkpoint-best")
best.mkdir(parents=True, exist_ok=True)
if flags.get("--use_peft", "True") == "True":
    (best / "adapter_config.json").touch()
"""
STAGES = ["pretraining.py", "supervised_finetuning.py", "dpo_training.py", "reward_modeling.py", "ppo_training.py"]
AFTER = [
    "merge_peft_adapter.py",
    *(f"scripts/{name}.py" for name in ("evaluate_model", "write_report", "show_answers")),
]


@pytest.fixture
def project(tmp_path) -> Path:
    """The launchers, and a set-up that makes the stand-in the Python of .venv."""
    for script in ROOT.glob("run_*.sh"):
        shutil.copy(script, tmp_path)
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    real = shlex.quote(sys.executable)
    made = f'#!/usr/bin/env bash\nexec {real} stand_in.py "$@"\n'
    setup = f"mkdir -p .venv/bin\nprintf %s {shlex.quote(made)} > .venv/bin/python\nchmod +x .venv/bin/python\n"
    (tmp_path / "setup.sh").write_text(setup)
    return tmp_path


def start(project: Path, **variables: str) -> tuple[subprocess.CompletedProcess, list[tuple[str, dict[str, str]]]]:
    """The finished demo; script and last value of each flag of its calls."""
    (project / "calls.jsonl").write_text("")
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "N_PROCESSES")}
    finished = subprocess.run(
        ["bash", "run_demo.sh"],
        cwd=project,
        env=kept | {"CUDA_VISIBLE_DEVICES": "0,1"} | variables,  # the demo is for the CPU, whatever is there
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    calls = []
    for line in (project / "calls.jsonl").read_text().splitlines():
        words = json.loads(line)
        at = next(index for index, word in enumerate(words) if word.endswith(".py"))
        first = next((index for index, word in enumerate(words) if word.startswith("--")), len(words))
        calls.append((words[at], dict(pairs(words[first:]))))
    return finished, calls


def test_all_stages_with_flags_that_exist(project):
    finished, calls = start(project, PRECISION="autocast")
    assert finished.returncode == 0, finished.stderr
    assert [script for script, _ in calls] == [*STAGES, *AFTER]
    for script, flags in calls:
        unknown = {f"--{flag}" for flag in flags} - known_flags(script)
        assert not unknown, f"{script}: {unknown}"
    of = dict(calls)
    for script, flag in ((AFTER[0], "lora_model"), (AFTER[1], "base_model")):
        assert of[script][flag] == "outputs-ppo-demo/checkpoint-best"
    assert of["pretraining.py"]["model_name_or_path"] == "base_model"
    assert (ROOT / "base_model/model.safetensors").is_file()
    assert (ROOT / of["pretraining.py"]["train_file_dir"]).is_file()
    assert {of[script]["cpu_bf16"] for script in STAGES} == {"autocast"}


def test_a_failure_stops_it_and_the_next_start_goes_on(project):
    failed, calls = start(project, FAIL_AT="reward_modeling.py")
    assert failed.returncode == 3
    assert calls[-1][0] == "reward_modeling.py"
    again, calls_again = start(project)
    assert again.returncode == 0, again.stderr
    assert calls_again[: len(calls)] == calls  # what is finished says so itself
    assert [script for script, _ in calls_again] == [*STAGES, *AFTER]
