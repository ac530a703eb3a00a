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
    find_spec("lm_eval") is None, reason="lm_eval is not installed: pip install -r requirements/eval.txt"
)


def run_eval(folder: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **variables}
    command = ["bash", "run_eval.sh", *flags]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def write_csv(path: Path, rows: list[list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


@pytest.fixture
def project(tmp_path):
    """A folder with the launcher, the task files and the sample data, to write into."""
    shutil.copy(ROOT / "run_eval.sh", tmp_path)
    (tmp_path / "medtune").mkdir()
    for name in ("devices.py", "errors.py"):
        shutil.copy(ROOT / "medtune" / name, tmp_path / "medtune")
    shutil.copytree(ROOT / "eval_tasks", tmp_path / "eval_tasks")
    shutil.copytree(ROOT / "data/eval", tmp_path / "data/eval")
    return tmp_path


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_a_task_file_bears_its_name_and_says_where_its_data_come_from(path):
    text = path.read_text(encoding="utf-8")
    assert re.search(rf"^(task|group): {path.stem}$", text, re.MULTILINE)
    assert text.startswith("# ")
    for file in re.findall(r"(?:test|dev): (\S+)", text):
        assert file == "data/eval/exam.jsonl" or file.startswith("data/benchmarks/")


def test_a_benchmark_that_is_not_there_is_one_line(project):
    (project / "python").write_text("#!/bin/sh\n", encoding="utf-8")
    (project / "python").chmod(0o755)
    finished = run_eval(project, PYTHON=str(project / "python"), TASKS="medical_exam,medical_zh")
    assert finished.returncode == 2
    assert finished.stderr == (
        "error: TASKS=medical_exam,medical_zh: there is no data/benchmarks/cmmlu/test/anatomy.csv; "
        "eval_tasks/medical_zh.yaml says what to put there\n"
    )


def test_without_the_harness_the_launcher_says_how_to_get_it(project):
    python = project / "python"
    python.write_text('#!/bin/sh\n[ "$1" != -c ]\n', encoding="utf-8")
    python.chmod(0o755)
    finished = run_eval(project, PYTHON=str(python))
    assert finished.returncode == 2
    assert finished.stderr.endswith("python -m pip install -r requirements/eval.txt\n")


@pytest.mark.parametrize(
    ("flags", "passed"),
    [
        ("", ""),
        ("--limit 5", "--limit 5"),
        ("--use_cpu True --limit 5", "--limit 5 --device cpu"),
        ("--limit 5 --use_cpu", "--limit 5 --device cpu"),
        ("--use_cpu=True", "--device cpu"),
        ("--device cuda:1", "--device cuda:1"),
    ],
)
def test_the_choice_of_the_cpu_is_said_in_the_harness_s_words(project, flags, passed):
    python = project / "python"
    reads_flags = f'[ "$2" != medtune.devices ] || exec {sys.executable} "$@"'
    python.write_text(f'#!/bin/sh\n{reads_flags}\necho "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    finished = run_eval(project, *flags.split(), PYTHON=str(python), PATH="/usr/bin:/bin", CUDA_VISIBLE_DEVICES="0")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.partition(" --log_samples")[2].split() == passed.split()


@needs_harness
@pytest.mark.slow
def test_each_local_task_runs_offline(project, tiny_model_dir):
    benchmarks = project / "data/benchmarks"
    benchmarks.mkdir()
    cmb = {"question": "q", "option": {"A": "a", "B": "b", "C": ""}, "answer": "B"}
    for name, records in (
        ("cmb", [cmb, cmb | {"answer": "AB"}, cmb | {"option": {"A": "a", "B": "b", "C": "c", "D": "d"}}]),
        ("medqa_zh", [QUESTION]),
        ("medqa_en", [QUESTION]),
    ):
        lines = [json.dumps(record) + "\n" for record in records]
        (benchmarks / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    rows = [["Question", "Options", "Answer"], ["q", "A a\nB b", "A"], ["two right answers", "A a\nB b", "AB"]]
    write_csv(benchmarks / "cmexam.csv", rows)
    subjects = re.findall(r"data/benchmarks/cmmlu/\S+", (project / "eval_tasks/medical_zh.yaml").read_text())
    for file in subjects:
        write_csv(project / file, [["", "Question", *"ABCD", "Answer"], ["0", "q", *"abcd", "C"]])
    import pyarrow
    import pyarrow.parquet

    record = {"question": "q?", "context": {"contexts": ["one", "two"]}, "final_decision": "maybe"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), benchmarks / "pubmedqa.parquet")
    tasks = "medical_exam,cmb_exam,cmexam,medqa_zh,medqa_en,pubmedqa_local"
    of_group = {f"cmmlu_{Path(file).stem}" for file in subjects}
    finished = run_eval(
        project,
        *("--limit", "10"),
        **{"PYTHON": sys.executable, "MODEL": str(tiny_model_dir), "TASKS": f"{tasks},medical_zh", "OUTPUT": "out"},
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    (results,) = (project / "out").rglob("results*.json")
    found = json.loads(results.read_text(encoding="utf-8"))
    assert set(found["results"]) == {*tasks.split(","), "medical_zh"} | of_group
    assert {name: n["effective"] for name, n in found["n-samples"].items()} == {
        **dict.fromkeys({*tasks.split(",")} | of_group, 1),
        **{"medical_exam": 10, "cmb_exam": 2},
    }
    (samples,) = (project / "out").rglob("samples_medical_exam*.jsonl")
    sample = json.loads(samples.read_text(encoding="utf-8").splitlines()[0])
    prompt = sample["arguments"]["gen_args_0"]["arg_0"]
    exam = json.loads((ROOT / "data/eval/exam.jsonl").read_text(encoding="utf-8").splitlines()[0])
    options = "".join(f"{letter}. {text}\n" for letter, text in exam["option"].items())
    assert f"<|im_start|>user\n{exam['question']}\n{options}答案：<|im_end|>\n<|im_start|>assistant\n" in prompt
    assert [sample["arguments"][f"gen_args_{n}"]["arg_1"] for n in range(5)] == list("ABCDE")
