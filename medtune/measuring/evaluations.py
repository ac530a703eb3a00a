"""What scripts/evaluate_model.py left in a folder, and what its models are called on a page."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from medtune.errors import UserError
from medtune.measuring.figures import score
from medtune.reading.magic_bytes import misnamed, read_start


def read_object(file: Path) -> dict:
    """The object in a JSON file, {} if there is no file; raises UserError if it is broken."""
    return parse_object(file.read_bytes(), str(file)) if file.is_file() else {}


def parse_object(text: bytes, source: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{source}: not JSON ({error}); restore it, or run again what wrote it") from None
    if not isinstance(value, dict):
        raise UserError(f"{source}: no JSON object; restore it, or run again what wrote it")
    return value


def read_evaluation(folder: Path) -> tuple[dict, list[dict]]:
    report = read_object(folder / "metrics.json")
    if "metrics" not in report:
        raise UserError(f"--evaluation {folder}: no metrics.json of scripts/evaluate_model.py in it")
    file = folder / "predictions.jsonl"
    if not file.is_file():
        raise UserError(f"--evaluation {folder}: no predictions.jsonl in it; run scripts/evaluate_model.py again")
    lines = file.read_bytes().splitlines()
    return report, [parse_object(line, f"{file}:{number}") for number, line in enumerate(lines, start=1)]


def read_predictions(path: Path) -> list[dict]:
    """The rows of an earlier predictions.jsonl; raises UserError if it is not one, or incomplete."""
    if not path.is_file():
        raise UserError(f"--predictions {path}: no such file")
    if fault := misnamed(read_start(path, str(path))):
        raise UserError(f"--predictions {path}: {fault}")
    rows, questions_by_model = [], {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            row["scores"] = score(row)
            questions_by_model.setdefault(row["model"], []).append((row["file"], row["messages"]))
            rows.append({"model": row.pop("model"), "file": row.pop("file")} | row)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise UserError(f"{path}:{number}: no record of predictions.jsonl") from None
    if not rows:
        raise UserError(f"--predictions {path}: it is empty")
    first = next(iter(questions_by_model))
    for model, questions in questions_by_model.items():
        # Compared pair by pair.
        if questions != questions_by_model[first]:
            raise UserError(f"--predictions {path}: the records of {model} are not those of {first}, in their order")
    return rows


def short_name(model: str) -> str:
    """A model's name without /checkpoint-best."""
    return re.sub(r"/checkpoint-best/?$", "", model)


def axis_names(models: Sequence[str], stages: Mapping[Path, str]) -> list[str]:
    """The stage of each model whose folder, resolved, is in `stages` (SFT), of any other the last part of its path."""
    names = [stages.get(Path(short_name(model)).resolve()) or Path(short_name(model)).name for model in models]
    # Two models of one name: in full.
    return [short_name(model) if names.count(name) > 1 else name for model, name in zip(models, names, strict=True)]
