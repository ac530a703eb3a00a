"""Publish what a sitting of scripts/train_base_model.sh trained: bfloat16 weights, the tokenizer, and a card.

Input: the output folder of pretraining.py, with the evaluation's metrics.json in evaluation/.
Output: `--output_dir` with what transformers loads, sittings.json (how each sitting ran) and README.md, the card.

    python scripts/publish_base_model.py --run outputs-base-1 --sitting 1 --tokens_per_step 8192 \\
        --corpus cache/base-corpus/pretrain/documents.jsonl
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import medtune.libraries  # noqa: F401 - first: it imports the libraries in half of their time

# isort: split
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from medtune.errors import UserError, run_script
from medtune.models.lineage import read_lineage

BEST = "checkpoint-best"
SITTINGS_FILE = "sittings.json"
LARGEST_WEIGHTS = 16_000_000  # bytes
PROMPTS = ("急性支气管炎的常见表现有", "高血压患者日常要注意", "痛风和", "The usual symptoms of asthma are")
SHOWN_FLAGS = (
    *("--learning_rate", "--lr_scheduler_type", "--lr_scheduler_kwargs", "--warmup_steps", "--weight_decay"),
    *("--adam_beta2", "--block_size", "--seed", "--data_seed", "--cpu_bf16"),
)

CARD = """---
license: apache-2.0
language: [zh, en]
---

# A small base model of medical text

A Qwen2 with {n_parameters:,} parameters ({shape}), from which the demo starts. It was trained from random weights on a
CPU, by this repository's own `pretraining.py`, on text that `scripts/build_sample_data.py --corpus` draws from
[data/knowledge](../data/README.md). It continues such text; it is no chat model. Asked through a chat template, it
names the right condition in {named:.3f} of {n_asked} answers (`data/eval/questions.jsonl`).

**For trying this code, not for patients.** It repeats what it has read, and what it says may be wrong.

## How it was made

```bash
bash scripts/train_base_model.sh                # the first sitting; a later one: SITTING=2
```

{sittings}

Each sitting begins with the weights of the one before (the first with random ones), a new optimizer and another order
of the documents. The losses are those of float32 weights, before they are rounded to bfloat16.

## What it has not read

The conditions of `data/eval/unseen_conditions.jsonl`, any item of `data/eval`, and the guide's four questions with
their answers. `tests/sample_data/test_corpus.py` looks for them.

## What it writes

Greedily, after the words before the bar:

{samples}
"""


def sitting_record(run: Path, number: int, tokens_per_step: int, corpus: Path) -> dict[str, Any]:
    """How a sitting ran, from what pretraining.py and the evaluation left; the hours are those of training alone."""
    files = [run / name for name in ("trainer_state.json", "eval_results.json", "evaluation/metrics.json")]
    if missing := [str(file) for file in files if not file.is_file()]:
        raise UserError(f"--run {run}: no {' and no '.join(missing)}; let scripts/train_base_model.sh finish")
    state, results, metrics = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    logs = [entry for entry in state["log_history"] if "tokens_per_second" in entry]
    steps = [0, *(entry["step"] for entry in logs)]
    seconds = sum(
        (entry["step"] - before) * tokens_per_step / entry["tokens_per_second"]
        for before, entry in zip(steps, logs, strict=False)
    )
    (asked,) = metrics["metrics"].values()
    (figures,) = asked["models"].values()
    return {
        "sitting": number,
        "steps": state["global_step"],
        "tokens": state["global_step"] * tokens_per_step,
        "hours": round(seconds / 3600, 2),
        "last_train_loss": logs[-1]["loss"],
        "eval_loss": results["eval_loss"],
        "eval_bits_per_byte": results["eval_bits_per_byte"],
        "named": figures["named"]["value"],
        "n_asked": figures["n"],
        "corpus_sha256": hashlib.sha256(corpus.read_bytes()).hexdigest(),
        "flags": {flag: value for flag, value in read_lineage(run / BEST).flags.items() if flag in SHOWN_FLAGS},
        "torch": torch.__version__,
    }


def continuations(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the model writes after each prompt, as lines of a list."""
    lines = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        written = model.generate(ids, max_new_tokens=60, do_sample=False)[0, ids.shape[1] :]
        text = tokenizer.decode(written, skip_special_tokens=True)
        lines.append(f"- {prompt} | {' '.join(text.split())}")
    return lines


def card(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sittings: list[dict[str, Any]]) -> str:
    """The model card: how the model was made, from the records of its sittings, and what it writes."""
    config, last = model.config, sittings[-1]
    rows = [
        "| sitting | steps | tokens | hours | loss at the end | held-out loss | bits per byte | sha256 of the text |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in sittings:
        rows.append(
            "| {sitting} | {steps:,} | {tokens:,} | {hours} | {last_train_loss:.4f} | {eval_loss:.4f} | "
            "{eval_bits_per_byte:.4f} | `{corpus_sha256:.16}` |".format(**record)
        )
    flags = " ".join(f"{flag} {value}" for flag, value in last["flags"].items())
    return CARD.format(
        n_parameters=model.num_parameters(),
        shape=f"{config.num_hidden_layers} layers of {config.hidden_size}, {config.num_attention_heads} heads of 64, "
        f"{config.vocab_size:,} tokens",
        named=last["named"],
        n_asked=last["n_asked"],
        sittings="\n".join([*rows, "", f"With `{flags}`, and torch {last['torch']}."]),
        samples="\n".join(continuations(model, tokenizer)),
    )


# ---------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    """Round the weights, and write them with the tokenizer, the sittings so far and the card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="output folder of the sitting's pretraining.py")
    parser.add_argument("--sitting", type=int, required=True, help="its number; the first is 1")
    parser.add_argument("--tokens_per_step", type=int, required=True, help="of all processes")
    parser.add_argument("--corpus", type=Path, required=True, help="the text that it read, for its hash")
    parser.add_argument("--output_dir", type=Path, default=Path("base_model"), help="the published folder")
    args = parser.parse_args(argv)

    record = sitting_record(args.run, args.sitting, args.tokens_per_step, args.corpus)
    sittings_file = args.output_dir / SITTINGS_FILE
    earlier = json.loads(sittings_file.read_text(encoding="utf-8")) if sittings_file.is_file() else []
    sittings = [*(other for other in earlier if other["sitting"] < args.sitting), record]
    if [other["sitting"] for other in sittings] != list(range(1, args.sitting + 1)):
        raise UserError(f"--sitting {args.sitting}: {sittings_file} does not hold the sittings before it")

    model = AutoModelForCausalLM.from_pretrained(args.run / BEST, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(args.run / BEST)
    n_bytes = 2 * model.num_parameters()
    if n_bytes > LARGEST_WEIGHTS:
        raise UserError(f"--run {args.run}: {n_bytes:,} bytes of weights, of which the repository takes 16,000,000")
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    sittings_file.write_text(json.dumps(sittings, indent=2) + "\n", encoding="utf-8")
    (args.output_dir / "README.md").write_text(card(model.float(), tokenizer, sittings), encoding="utf-8")
    print(f"{args.output_dir}: {model.num_parameters():,} parameters in bfloat16, {len(sittings)} sittings")


if __name__ == "__main__":
    run_script(main)
