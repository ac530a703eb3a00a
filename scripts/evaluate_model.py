"""Compare a model's greedy replies with references: character ROUGE, the right name, how replies end.

Input: dialogues whose last replies are the references; `names` of a record lists what a right answer may call it.
Output: `--output_dir` with predictions.jsonl (a record with reply and scores for each dialogue) and metrics.json.
The replies come from inference.py, so the prompts are those of training. `--predictions` computes the figures again
from an earlier predictions.jsonl, without a model.

    python scripts/evaluate_model.py --base_model MODEL --lora_model ADAPTER --test_file data/eval/questions.jsonl
"""

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from errors import UserError, run_script
from output_files import new_folder
from records import find_files, load_dialogues
from text_metrics import names_one_of, repetition_rate, rouge

ROOT = Path(__file__).resolve().parents[1]

# ---------------------------------------------------------------- replies


def choose_records(test_file: str, num_samples: int | None, seed: int) -> list[dict]:
    """The test file's dialogues with what their records say besides: all, or a seeded choice in their order."""
    files, _ = find_files(test_file, "--test_file")
    dialogues, _ = load_dialogues(files)
    chosen = range(len(dialogues))
    if num_samples is not None and num_samples < len(dialogues):
        chosen = sorted(random.Random(seed).sample(chosen, num_samples))
    extras = record_extras(files)
    return [{"messages": dialogues[n].messages, **extras.get(dialogues[n].source, {})} for n in chosen]


def record_extras(files: Sequence[Path]) -> dict[str, dict]:
    """`id`, `aspect`, `category` and `names` of the records in .jsonl files, by `file:line`."""
    extras = {}
    for path in (path for path in files if path.suffix == ".jsonl"):
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
            if line.strip():
                record = json.loads(line)
                kept = {key: record[key] for key in ("id", "aspect", "category", "names") if key in record}
                extras[f"{path}:{number}"] = kept
    return extras


def generate(records: Sequence[dict], args: argparse.Namespace, folder: Path) -> list[dict]:
    """The records with `reply` and `ended`, from a run of inference.py in `folder`, where its files stay until read."""
    questions, replies = folder / "questions.jsonl", folder / "replies.jsonl"
    lines = [json.dumps({"messages": record["messages"]}, ensure_ascii=False) + "\n" for record in records]
    questions.write_text("".join(lines), encoding="utf-8")
    flags = {
        "base_model": args.base_model,
        "lora_model": args.lora_model,
        "template_name": args.template_name,
        "data_file": questions,
        "output_file": replies,
        "max_new_tokens": args.max_new_tokens,
        "batch_size": args.batch_size,
    }
    words = [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
    finished = subprocess.run([sys.executable, str(ROOT / "inference.py"), *words], check=False)
    if finished.returncode:
        sys.exit(finished.returncode)  # it has said why
    answered = [json.loads(line) for line in replies.read_text(encoding="utf-8").splitlines()]
    questions.unlink()
    replies.unlink()
    return [
        record | {"reply": answer["output"], "ended": answer["ended"]}
        for record, answer in zip(records, answered, strict=True)
    ]


# ---------------------------------------------------------------- figures


def score(record: dict) -> dict:
    """The record with the scores of its reply against its reference, the last message."""
    reference = record["messages"][-1]["content"]
    scores = rouge(record["reply"], reference) | {"repetition": repetition_rate(record["reply"])}
    if record.get("names"):
        scores["named"] = float(names_one_of(record["reply"], record["names"]))
    return record | {"scores": scores | {"ended": float(record["ended"]), "length": float(len(record["reply"]))}}


def summarize(records: Sequence[dict]) -> dict[str, float]:
    """The mean of each score over the records that have it."""
    names = list(dict.fromkeys(name for record in records for name in record["scores"]))
    values = {name: [r["scores"][name] for r in records if name in r["scores"]] for name in names}
    return {"n": len(records)} | {name: round(sum(v) / len(v), 4) for name, v in values.items()}


def metrics_of(records: Sequence[dict]) -> dict:
    """Means over all records, and over those of each aspect or category."""
    groups: dict[str, list[dict]] = {}
    for record in records:
        group = record.get("aspect") or record.get("category")
        if group:
            groups.setdefault(group, []).append(record)
    return {"all": summarize(records)} | {name: summarize(groups[name]) for name in sorted(groups)}


def print_table(metrics: dict[str, dict[str, float]]) -> None:
    columns = ["n", "rouge_l", "named", "ended", "repetition", "length"]
    print(f"{'':<16}" + "".join(f"{column:>12}" for column in columns))
    for group, values in metrics.items():
        cells = [
            f"{values[c]:>12.3f}" if isinstance(values.get(c), float) else f"{values.get(c, '-'):>12}" for c in columns
        ]
        print(f"{group:<16}" + "".join(cells))


# ---------------------------------------------------------------- main


def read_predictions(path: Path) -> list[dict]:
    """The records of an earlier predictions.jsonl; UserError where it is none."""
    if not path.is_file():
        raise UserError(f"--predictions {path}: no such file")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            records.append({key: record[key] for key in record if key != "scores"} | {"reply": record["reply"]})
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(f"{path}:{number}: no record of predictions.jsonl") from None
    return records


def main(argv: list[str] | None = None) -> None:
    """Generate or read the replies, score them, write and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base_model", help="hub name or folder of a model")
    parser.add_argument("--lora_model", help="folder of a LoRA adapter trained on it")
    parser.add_argument("--template_name", help="named prompt template instead of the tokenizer's own")
    parser.add_argument("--test_file", help="file or folder of dialogues, whose last replies are the references")
    parser.add_argument("--num_samples", type=int, help="at most so many dialogues, drawn with the seed")
    parser.add_argument("--predictions", type=Path, help="an earlier predictions.jsonl instead of a model")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs-eval"), help="new folder for the results")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run left in --output_dir")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="a reply is cut after so many tokens")
    parser.add_argument("--batch_size", type=int, default=16, help="prompts answered at a time")
    parser.add_argument("--seed", type=int, default=42, help="of the choice of --num_samples")
    args = parser.parse_args(argv)
    if bool(args.predictions) == bool(args.base_model):
        raise UserError("--base_model and --predictions: give one of them")
    if args.base_model and not args.test_file:
        raise UserError("--test_file is missing: name the dialogues to answer")
    if args.num_samples is not None and args.num_samples < 1:
        raise UserError(f"--num_samples {args.num_samples}: give at least 1")

    records = read_predictions(args.predictions) if args.predictions else None
    if records is None:
        records = choose_records(args.test_file, args.num_samples, args.seed)
    with new_folder(args.output_dir, "--output_dir", args.overwrite) as folder:
        if not args.predictions:
            records = generate(records, args, folder)
        records = [score(record) for record in records]
        metrics = metrics_of(records)
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (folder / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
        settings = {name: str(value) for name, value in vars(args).items() if value is not None}
        report = {"settings": settings, "metrics": metrics}
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        (folder / "metrics.json").write_text(text, encoding="utf-8")
    print_table(metrics)
    print(f"{args.output_dir}: metrics.json and predictions.jsonl")


if __name__ == "__main__":
    run_script(main)
