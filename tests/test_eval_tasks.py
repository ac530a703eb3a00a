"""The task files of lm-evaluation-harness and their launcher; with the harness itself where it is installed."""

import ast
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import jinja2
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
TASKS = sorted((ROOT / "eval_tasks").glob("*.yaml"))
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
    for file in (ROOT / "medtune").glob("*.py"):
        shutil.copy(file, tmp_path / "medtune")
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


# Of each task the file, three records as they are published, and how the first is asked: its prompt and its letters.
OPTIONS = {"A": "神经内科", "B": "骨科"}
TEN = dict(
    zip("ABCDEFGHIJ", ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"], strict=True)
)
IN_COLUMNS = {"opa": "one", "opb": "two", "opc": "three", "opd": "four"}
CMB = {
    "exam_type": "医师考试",
    "exam_subject": "神经内科",
    "question": "头疼先看什么科？",
    "question_type": "单项选择题",
}
MEDQA = {"question": "头疼先看什么科？", "answer": "神经内科", "options": OPTIONS, "meta_info": "m", "answer_idx": "A"}
BULLETS = {"link": "https://step2.medbullets.com/testview?qid=1", "question": "What, then?", **IN_COLUMNS}
XPERT = {"id": "Text-1", "question": "What, then?\nAnswer Choices: (A) one (B) two", "options": TEN, "label": "J"}
LISTED = "".join(f"{letter}. {text}\n" for letter, text in TEN.items())
ABCD = "A. one\nB. two\nC. three\nD. four\n"
ZH, EN = "头疼先看什么科？\nA. 神经内科\nB. 骨科\n答案：", "Question: {}\n{}Answer:"
CONTEXT = {"contexts": ["one", "two"], "labels": ["BACKGROUND", "RESULTS"], "meshes": []}
PUBMEDQA = {"pubid": 1, "question": "q?", "context": CONTEXT, "long_answer": "No.", "final_decision": "maybe"}
PUBLISHED = {
    "cmb_exam": (
        "cmb.jsonl",
        [CMB | {"option": OPTIONS | {"E": ""}, "answer": answer} for answer in ("A", "B", "AB")],
        (ZH, "AB"),
    ),
    "cmexam": (
        "cmexam.csv",
        [{"Question": "头疼？", "Options": "A 神经内科\nB 骨科", "Answer": answer} for answer in ("A", "B", "AB")],
        ("头疼？\nA 神经内科\nB 骨科\n答案：", "ABCDE"),
    ),
    "medqa_zh": ("medqa_zh.jsonl", [MEDQA] * 3, (ZH, "AB")),
    "medqa_en": (
        "medqa_en.jsonl",
        [MEDQA | {"question": "What?"}] * 3,
        (EN.format("What?", "A. 神经内科\nB. 骨科\n"), ["A", "B"]),
    ),
    "pubmedqa_local": (
        "pubmedqa.parquet",
        [PUBMEDQA] * 3,
        ("Abstract: one\ntwo\nQuestion: q?\nAnswer:", ["yes", "no", "maybe"]),
    ),
    "medxpertqa": ("medxpertqa.jsonl", [XPERT] * 3, (EN.format("What, then?", LISTED), TEN)),
    "medbullets_op4": (
        "medbullets_op4.csv",
        [BULLETS | {"answer_idx": "C", "answer": "three", "explanation": 'A "long" one,\n\nin lines.'}] * 3,
        (EN.format("What, then?", ABCD), "ABCD"),
    ),
    "medbullets_op5": (
        "medbullets_op5.csv",
        [BULLETS | {"ope": "five", "answer_idx": "E", "answer": "five", "explanation": "Five."}] * 3,
        (EN.format("What, then?", f"{ABCD}E. five\n"), "ABCDE"),
    ),
}
RIGHT = {
    **{"medqa_zh": ["A"] * 3, "medqa_en": ["A"] * 3, "pubmedqa_local": ["maybe"] * 3},
    **{"medxpertqa": ["J"] * 3, "medbullets_op4": ["C"] * 3, "medbullets_op5": ["E"] * 3},
}
# Of the harness's own tasks in medical_en, whose data the hub has: a folder of that name comes before it.
OF_HUB = {
    "GBaker/MedQA-USMLE-4-options-hf": [
        {"id": "1", "sent1": "What?", "sent2": "", "ending0": "a", "ending1": "b", "ending2": "c", "ending3": "d"}
        | {"label": 3}
    ],
    "openlifescienceai/medmcqa": [
        {"id": "1", "question": "What?", **IN_COLUMNS, "cop": 1, "choice_type": "single", "exp": None}
        | {"subject_name": "Anatomy", "topic_name": None}
    ],
    "cais/mmlu": [{"question": "What?", "subject": "s", "choices": ["a", "b", "c", "d"], "answer": 2}],
}


def write_records(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        write_csv(path, [list(records[0]), *(list(record.values()) for record in records)])
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        path.write_text("".join(lines), encoding="utf-8")


class TaskLoader(yaml.SafeLoader):
    """Reads a function as its name."""


TaskLoader.add_constructor("!function", lambda loader, node: node.value)


def read_task(path: Path) -> dict:
    task = yaml.load(path.read_text(encoding="utf-8"), TaskLoader)
    return read_task(path.parent / task["include"]) | task if "include" in task else task


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_task_asks_three_records_of_its_published_form(name, tmp_path, monkeypatch):
    """As the harness does, which not everyone has installed: rows by `datasets`, texts by Jinja."""
    import datasets

    file, records, (prompt, letters) = PUBLISHED[name]
    task = read_task(ROOT / "eval_tasks" / f"{name}.yaml")
    assert task["task"] == name
    assert task["dataset_kwargs"]["data_files"] == {"test": f"data/benchmarks/{file}"}
    write_records(tmp_path / file, records)
    files = {"test": str(tmp_path / file)}
    rows = datasets.load_dataset(task["dataset_path"], data_files=files, split="test", cache_dir=str(tmp_path / "c"))
    if "process_docs" in task:
        monkeypatch.syspath_prepend(str(ROOT / "eval_tasks"))
        module, function = task["process_docs"].split(".")
        rows = getattr(import_module(module), function)(rows)
    assert len(rows) == (2 if name in ("cmb_exam", "cmexam") else 3)  # without those of several right answers
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    assert environment.from_string(task["doc_to_text"]).render(**rows[0]) == prompt
    choices = task["doc_to_choice"]
    if isinstance(choices, str):
        choices = ast.literal_eval(environment.from_string(choices).render(**rows[0]))
    assert choices == list(letters)
    assert [row[task["doc_to_target"]] for row in rows] == RIGHT.get(name, ["A", "B", "AB"])[: len(rows)]


def write_data_sets_of_hub(project: Path, subjects: list[str]) -> None:
    for name, records in OF_HUB.items():
        for split in ("train", "validation", "test", "dev"):
            write_records(project / name / f"{split}.jsonl", records * 3)
        splits = [
            {"split": split, "path": f"{split}.jsonl"} for split in ("test", "dev" if "mmlu" in name else "train")
        ]
        configs = subjects if "mmlu" in name else ["default"]
        splits += [] if "mmlu" in name else [{"split": "validation", "path": "validation.jsonl"}]
        heads = [{"config_name": config, "data_files": splits} for config in configs]
        (project / name / "README.md").write_text(f"---\n{json.dumps({'configs': heads})}\n---\n", encoding="utf-8")


def ask_all(project: Path, model: Path, tasks: str) -> tuple[dict, dict[str, list[dict]]]:
    """What the harness wrote: the results, and by task the samples."""
    variables = {"PYTHON": sys.executable, "MODEL": str(model), "TASKS": tasks, "OUTPUT": "out"}
    finished = run_eval(project, "--limit", "10", **variables)
    assert finished.returncode == 0, finished.stderr[-2000:]
    (results,) = (project / "out").rglob("results*.json")
    found = json.loads(results.read_text(encoding="utf-8"))
    samples = {}
    for name in found["n-samples"]:
        (file,) = (project / "out").rglob(f"samples_{name}_2*.jsonl")
        samples[name] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return found, samples


def asked(sample: dict) -> tuple[str, list[str]]:
    """The prompt that the harness sent, and the answers whose likelihoods it asked for."""
    requests = list(sample["arguments"].values())
    return requests[0]["arg_0"], [request["arg_1"] for request in requests]


@needs_harness
@pytest.mark.slow
def test_each_local_task_asks_three_records_of_its_published_form(project, tiny_model_dir):
    for file, records, _ in PUBLISHED.values():
        write_records(project / "data/benchmarks" / file, records)
    subjects = re.findall(r"data/benchmarks/cmmlu/\S+", (project / "eval_tasks/medical_zh.yaml").read_text())
    for file in subjects:
        rows = [[str(number), "q", *"abcd", "C"] for number in range(3)]
        write_csv(project / file, [["", "Question", *"ABCD", "Answer"], *rows])
    of_group = {f"cmmlu_{Path(file).stem}" for file in subjects}
    found, samples = ask_all(project, tiny_model_dir, ",".join(["medical_exam", *PUBLISHED, "medical_zh"]))
    assert set(found["results"]) == {"medical_exam", *PUBLISHED, "medical_zh"} | of_group
    assert {name: len(rows) for name, rows in samples.items()} == {
        **dict.fromkeys({*PUBLISHED} | of_group, 3),
        **{"medical_exam": 10, "cmb_exam": 2, "cmexam": 2},  # without those of several right answers
    }
    for name, (_, _, (prompt, answers)) in PUBLISHED.items():
        sent, choices = asked(samples[name][0])
        assert f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n" in sent, name
        assert [choice.strip() for choice in choices] == list(answers), name
    assert [samples[f"medbullets_op{n}"][0]["target"] for n in (4, 5)] == ["C", "E"]
    exam = json.loads((ROOT / "data/eval/exam.jsonl").read_text(encoding="utf-8").splitlines()[0])
    options = "".join(f"{letter}. {text}\n" for letter, text in exam["option"].items())
    sent, choices = asked(samples["medical_exam"][0])
    assert f"<|im_start|>user\n{exam['question']}\n{options}答案：<|im_end|>\n<|im_start|>assistant\n" in sent
    assert choices == list("ABCDE")


@needs_harness
@pytest.mark.slow
def test_the_names_of_medical_en_are_the_harness_s_of_today(project, tiny_model_dir):
    names = re.findall(r"^  - (\w+)$", (project / "eval_tasks/medical_en.yaml").read_text(), re.MULTILINE)
    write_data_sets_of_hub(project, [name.removeprefix("mmlu_") for name in names if name.startswith("mmlu_")])
    found, samples = ask_all(project, tiny_model_dir, "medical_en")
    assert set(found["results"]) == {"medical_en", *names}
    assert {name: len(rows) for name, rows in samples.items()} == dict.fromkeys(names, 3)
    letters = {name: "".join(choice.strip() for choice in asked(rows[0])[1]) for name, rows in samples.items()}
    assert letters == dict.fromkeys(names, "ABCD")
