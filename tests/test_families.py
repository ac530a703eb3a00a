"""Every family through every stage: all is done, or refused in one line that names a way on; never a traceback.

A family that is refused where it was not, or done where it was refused, fails here: `refusals` is what docs say.
"""

import re
from pathlib import Path

import pytest
import test_grpo_training
import test_ppo_training
from stage_runs import stage_flags, words
from tiny_families import AS_SHIPPED, FAMILIES, save_family

import dpo_training
import grpo_training
import inference
import merge_peft_adapter
import ppo_training
import pretraining
import reward_modeling
import supervised_finetuning
from medtune.errors import UserError

# Recurrent layers and convolutions without their kernels.
MIX_TEXTS = {
    *("qwen3_5", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "lfm2", "lfm2_moe", "granitemoehybrid"),
    *("falcon_h1", "nemotron_h", "jamba", "mamba2"),
}
MASKS_GO_BY_NO_POSITIONS = {"gpt_oss"}
NO_SCORE_HEAD = {"mamba2"}
REFUSED_AS = {"packing": "`--packing True`", "pt": "pretraining", "rm": "reward model, PPO", "ppo, grpo": "PPO, GRPO"}


def refusals(family: str) -> dict[str, str]:
    """By stage the end of the line, with the way on."""
    lines = {}
    if family in MASKS_GO_BY_NO_POSITIONS:
        lines["pt"] = "--packing_across_documents True goes on, and lets a document see the ones before it in its block"
    if family in MIX_TEXTS | MASKS_GO_BY_NO_POSITIONS:
        lines["packing"] = "--packing False gives each a row of its own"
    if family in NO_SCORE_HEAD:
        lines["rm"] = "a kind of model that these versions of the libraries give no such head"
    if family == "opt":  # whose head goes by a decoder inside of its backbone
        lines["ppo"] = lines["grpo"] = "and would be trained on wrong probabilities; take another model"
    return lines


def outcome(main, argv: list[str]) -> str:
    """ "ok", or why the run was refused; a traceback fails the test."""
    try:
        main(argv)
    except UserError as error:
        line = str(error)
        assert "\n" not in line
        return line
    return "ok"


def through_all_stages(model: Path, folder: Path) -> dict[str, str]:
    """What each stage makes of the model, with the flags' defaults; those that need a refused one are left out."""
    out = {stage: folder / stage for stage in ("pt", "sft", "packing", "rm", "dpo", "ppo", "grpo", "merge")}
    sft, rm = out["sft"] / "checkpoint-best", out["rm"] / "checkpoint-best"

    def train(stage: str, main, data: str, start: Path, **changes) -> str:
        options = {"max_steps": 2, "gradient_checkpointing": None, "output_dir": out[stage], "save_strategy": "no"}
        return outcome(main, stage_flags(data, start, folder, **options | changes))

    results = {
        "pt": train("pt", pretraining.main, "pt", model),
        "packing": train("packing", supervised_finetuning.main, "sft", model, packing=True),
        "sft": train("sft", supervised_finetuning.main, "sft", model),
    }
    if results["sft"] != "ok":
        return results
    results |= {"rm": train("rm", reward_modeling.main, "rm", sft), "dpo": train("dpo", dpo_training.main, "dpo", sft)}
    if results["rm"] == "ok":
        flags = test_ppo_training.short_run(sft, rm, folder, output_dir=out["ppo"])
        results["ppo"] = outcome(ppo_training.main, flags)
    flags = test_grpo_training.short_run(sft, folder, output_dir=out["grpo"])
    results["grpo"] = outcome(grpo_training.main, flags)
    flags = words({"lora_model": sft, "output_dir": out["merge"], "torch_dtype": "float32"})
    results["merge"] = outcome(merge_peft_adapter.main, flags)
    questions = folder / "questions.txt"
    questions.write_text("感冒了应该怎么办？\n孩子发烧怎么办？\n", encoding="utf-8")
    replies = []
    for name, models in {
        "adapter": {"base_model": model, "lora_model": sft},
        "merged": {"base_model": out["merge"]},
    }.items():
        file = folder / f"{name}.jsonl"
        flags = words(models | {"data_file": questions, "output_file": file, "max_new_tokens": 8})
        results[f"inference, {name}"] = outcome(inference.main, flags)
        replies.append(re.findall('"output": "(.*?)"', file.read_text(encoding="utf-8") if file.is_file() else ""))
    assert len(replies[0]) == 2
    assert replies[0] == replies[1]
    return results


def family_table() -> str:
    """What the test below holds each family to, for docs/models.md: those with the same refusals in one row."""
    names = {family: f"`{family}`" for family in FAMILIES} | {name: f"`{name}` as shipped" for name in AS_SHIPPED}
    rows: dict[tuple, list[str]] = {}
    for family, name in names.items():
        lines = refusals(family)
        refused = tuple((", ".join(key for key in lines if lines[key] == line), line) for line in lines.values())
        rows.setdefault(tuple(dict.fromkeys(refused)), []).append(name)
    table = "| `model_type` of config.json | refused | the line ends in |\n|---|---|---|\n"
    for refused, families in sorted(rows.items(), key=lambda row: len(row[0])):
        stages = "; ".join(REFUSED_AS.get(stages, stages) for stages, _ in refused) or "nothing"
        table += f"| {', '.join(families)} | {stages} | {'; '.join(line for _, line in refused)} |\n"
    return table


def test_docs_have_the_table():
    assert family_table() in Path(__file__).parents[1].joinpath("docs/models.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("family", [*AS_SHIPPED, *FAMILIES])
def test_a_family_through_all_stages(family, tiny_model_dir, tmp_path, monkeypatch):
    for language in ("CHINESE", "ENGLISH"):
        monkeypatch.setattr(merge_peft_adapter, f"{language}_QUESTIONS", ("How are you?",))
    results = through_all_stages(save_family(family, tmp_path / "model", tiny_model_dir), tmp_path)
    expected = refusals(family)
    refused = {stage: line for stage, line in results.items() if line != "ok"}
    assert refused.keys() == expected.keys(), refused
    for stage, line in refused.items():
        assert line.endswith(expected[stage]), stage
