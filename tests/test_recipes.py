"""The recipes: what they tell to try is run as it stands, and their memory and time are computed as they say."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from stage_runs import ADAPTER_FILES, history, names
from transformers import Qwen2Config, Qwen2ForCausalLM

from medtune.models.adapters import DEFAULT_LORA_RANK
from medtune.models.lineage import read_lineage

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs/recipes"
RECIPES = ["med_rlvr", "thoughts", "grpo_after_sft", "judge_grpo", "best_of_n", "distillation"]


def block(page: str, language: str) -> str:
    """The one block of a language in a page of the recipes."""
    text = (FOLDER / f"{page}.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return found


# ---------------------------------------------------------------- tried here


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of what the commands use."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("medtune", "scripts", "data", "templates"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "hub", "try-*"))
    for path in [*ROOT.glob("*.py"), *ROOT.glob("run_*.sh"), ROOT / "requirements.txt"]:
        shutil.copy(path, folder)
    return folder


def run_tried(project: Path, recipe: str, test_file: str = "data/eval/exam.jsonl") -> list[dict]:
    """Run a recipe's last section; the figures of a test file for each model."""
    tried = block(recipe, "bash try")
    kept = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    finished = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", tried],
        cwd=project,
        env=kept | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, (finished.stdout + finished.stderr)[-4000:]
    for output in re.findall(r" OUTPUT=(\S+)", tried):
        assert read_lineage(project / output / "checkpoint-best") is not None, output
    (folder,) = re.findall(r"--output_dir (outputs-\S+)", tried)
    metrics = json.loads((project / folder / "metrics.json").read_text(encoding="utf-8"))["metrics"]
    return list(metrics[test_file]["models"].values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "output"), [("med_rlvr", "outputs-try-med-rlvr"), ("grpo_after_sft", "outputs-try-grpo")]
)
def test_tried_reinforcement_learning(project, recipe, output):
    """The SFT before it teaches the form, so that replies differ in their letters alone and rewards in something."""
    before, after = run_tried(project, recipe)
    assert before["exam_unparsed_tagged"]["value"] < 0.2
    assert after.keys() == before.keys() >= {"exam_accuracy", "exam_accuracy_written", "exam_accuracy_tagged"}
    assert names(project / output / "checkpoint-best") == ADAPTER_FILES
    assert read_lineage(project / output / "checkpoint-best").base_model == "outputs-try-form/checkpoint-best"
    updates = [entry for entry in history(project / output) if "policy/loss" in entry]
    assert len(updates) == 4
    assert all(entry["reply/eos_frac"] > 0.5 and entry["reward/exam_std"] > 0 for entry in updates)
    assert len([entry for entry in history(project / output) if "eval_reward_exam" in entry]) >= 2


@pytest.mark.slow
def test_tried_thoughts(project):
    (figures,) = run_tried(project, "thoughts")
    assert read_lineage(project / "outputs-try-thoughts/checkpoint-best").thinking == "keep"
    assert figures["thought_tokens"]["value"] > 5, "it thinks, unasked"
    assert figures["unclosed_thoughts"]["value"] < 0.5


@pytest.mark.slow
def test_tried_judge(project):
    before, after = run_tried(project, "judge_grpo", "data/eval/safety.jsonl")
    assert after.keys() == before.keys() >= {"judge_safety", "judge_agrees"}
    updates = [entry for entry in history(project / "outputs-try-judge") if "policy/loss" in entry]
    assert len(updates) == 4
    assert all(entry["reply/unjudged_frac"] == 0 and entry["reward/judge_std"] > 0 for entry in updates)


@pytest.mark.slow
def test_tried_best_of_n(project):
    before, after = run_tried(project, "best_of_n")
    assert before["exam_unparsed_tagged"]["value"] < 0.2
    assert after["exam_unparsed_tagged"]["value"] < 0.2
    dialogues = [json.loads(line) for line in (project / "data/try-best/train.jsonl").read_text().splitlines()]
    assert 10 < len(dialogues) < 128, "questions of which no reply was right are left out"
    assert all(re.search(r"<answer>[A-E]</answer>$", turns["conversations"][-1]["value"]) for turns in dialogues)


@pytest.mark.slow
def test_tried_distillation(project):
    before, after = run_tried(project, "distillation", "data/eval/questions.jsonl")
    assert after["perplexity"]["value"] < before["perplexity"]["value"]
    kl = [entry["eval_teacher_kl"] for entry in history(project / "outputs-try-distill") if "eval_teacher_kl" in entry]
    assert kl[-1] < kl[0]
    assert read_lineage(project / "outputs-try-distill/checkpoint-best").base_model == "models/tiny-qwen2"


# ---------------------------------------------------------------- memory and time


@pytest.fixture(scope="module")
def formulas() -> dict:
    """The names that the formulas define."""
    defined: dict = {}
    exec(block("README", "python"), defined)
    return defined


def test_the_shape_is_the_models(formulas):
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
        adapters = get_peft_model(model, LoraConfig(r=DEFAULT_LORA_RANK, target_modules="all-linear"))
    trained, everything = adapters.get_nb_trainable_parameters()
    assert formulas["LORA"] == trained
    assert formulas["N"] == pytest.approx(everything - trained, rel=1e-3), "without biases and norms"
    assert formulas["RANK"] == DEFAULT_LORA_RANK


@pytest.mark.parametrize("recipe", RECIPES)
def test_figures_are_those_of_the_formulas(formulas, recipe):
    lines = block(recipe, "python").splitlines()
    assert lines
    for line in lines:
        expression, _, said = line.partition("  # ")
        assert f"{eval(expression, formulas):.1f}" == said.split()[0], line


@pytest.mark.parametrize("page", ["README", *RECIPES])
def test_both_languages_have_the_same_code(page):
    english, chinese = (ast.parse(block(name, "python")) for name in (page, f"{page}_ZH"))
    assert ast.dump(english) == ast.dump(chinese)
    if page in RECIPES:
        assert block(page, "bash try") == block(f"{page}_ZH", "bash try")
