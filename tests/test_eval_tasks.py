"""The task files of lm-evaluation-harness and their launcher; with the harness itself where it is installed."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TASKS = sorted((ROOT / "eval_tasks").glob("*.yaml"))
QUESTION = {
    "question": "头疼先看什么科？",
    "options": {"A": "神经内科", "B": "骨科"},
    "answer_idx": "A",
    "answer": "神经内科",
}
needs_harness = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm_eval is not installed: pip install -r requirements-eval.txt"
)


def run_eval(folder: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **variables}
    command = ["bash", "run_eval.sh", *flags]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def project(tmp_path):
    """A folder with the launcher, the task files and the sample data, to write into."""
    shutil.copy(ROOT / "run_eval.sh", tmp_path)
    shutil.copytree(ROOT / "eval_tasks", tmp_path / "eval_tasks")
    shutil.copytree(ROOT / "data/eval", tmp_path / "data/eval")
    return tmp_path


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_a_task_file_bears_its_name_and_says_where_its_data_come_from(path):
    text = path.read_text(encoding="utf-8")
    assert re.search(rf"^(task|group): {path.stem}$", text, re.MULTILINE)
    assert text.startswith("# ")
    for file in re.findall(r"test: (\S+)", text):
        assert file == "data/eval/exam.jsonl" or file.startswith("data/benchmarks/")


def test_without_the_harness_the_launcher_says_how_to_get_it(project):
    python = project / "python"
    python.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    python.chmod(0o755)
    finished = run_eval(project, PYTHON=str(python))
    assert finished.returncode == 2
    assert finished.stderr.endswith("python -m pip install -r requirements-eval.txt\n")


@needs_harness
@pytest.mark.slow
def test_each_local_task_runs_offline(project, tiny_model_dir):
    benchmarks = project / "data/benchmarks"
    benchmarks.mkdir()
    for name, record in (
        ("cmb", {"question": "q", "option": {"A": "a", "B": "b", "C": ""}, "answer": "B"}),
        ("medqa_zh", QUESTION),
        ("medqa_en", QUESTION),
    ):
        (benchmarks / f"{name}.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    with (benchmarks / "cmexam.csv").open("w", encoding="utf-8", newline="") as file:
        rows = [["Question", "Options", "Answer"], ["q", "A a\nB b", "A"], ["two right answers", "A a\nB b", "AB"]]
        csv.writer(file).writerows(rows)
    import pyarrow
    import pyarrow.parquet

    record = {"question": "q?", "context": {"contexts": ["one", "two"]}, "final_decision": "maybe"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), benchmarks / "pubmedqa.parquet")
    tasks = "medical_exam,cmb_exam,cmexam,medqa_zh,medqa_en,pubmedqa_local"
    finished = run_eval(
        project, "--limit", "10", PYTHON=sys.executable, MODEL=str(tiny_model_dir), TASKS=tasks, OUTPUT="out"
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    (results,) = (project / "out").rglob("results*.json")
    found = json.loads(results.read_text(encoding="utf-8"))
    assert set(found["results"]) == set(tasks.split(","))
    assert {name: n["effective"] for name, n in found["n-samples"].items()} == {
        **dict.fromkeys(tasks.split(","), 1),
        "medical_exam": 10,
    }
    (samples,) = (project / "out").rglob("samples_medical_exam*.jsonl")
    sample = json.loads(samples.read_text(encoding="utf-8").splitlines()[0])
    prompt = sample["arguments"]["gen_args_0"]["arg_0"]
    exam = json.loads((ROOT / "data/eval/exam.jsonl").read_text(encoding="utf-8").splitlines()[0])
    options = "".join(f"{letter}. {text}\n" for letter, text in exam["option"].items())
    assert f"<|im_start|>user\n{exam['question']}\n{options}答案：<|im_end|>\n<|im_start|>assistant\n" in prompt
    assert [sample["arguments"][f"gen_args_{n}"]["arg_1"] for n in range(5)] == list("ABCDE")
