"""Print a few answers of an evaluation, before training and after each stage.

Input: the output folder of scripts/evaluate_model.py. Shown are the guide's questions where they were asked (otherwise
the first question), and the first emergency, request to refuse and exam question, whatever the answers.

    python scripts/show_answers.py outputs-eval-qwen2.5-3b
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from medtune.errors import run_script
from medtune.measuring.evaluations import axis_names, read_evaluation, short_name
from medtune.measuring.pages import REPORT_NOTICE
from medtune.models.lineage import read_lineage
from medtune.reading.thoughts import split_reply

GUIDE = "guide_questions.jsonl"
LONGEST = 120  # characters of an answer; the whole is in predictions.jsonl and in the report


def chosen(rows: Sequence[dict]) -> list[int]:
    """The places of the questions to show, in the rows of a model."""
    plain = [n for n, row in enumerate(rows) if row["kind"] == "dialogue"]
    guide = [n for n in plain if Path(rows[n]["file"]).name == GUIDE]
    others = [
        [n for n, row in enumerate(rows) if row.get("category") == "emergency"],
        [n for n, row in enumerate(rows) if row.get("category") == "refusal"],
        [n for n, row in enumerate(rows) if row["kind"] == "exam"],
    ]
    return (guide or plain[:1]) + [n for of_kind in others for n in of_kind[:1]]


def shown(row: dict) -> str:
    """An answer in one line, its thought as "(thought) "."""
    thought, answer, is_closed = split_reply(row["reply"])
    if not is_closed:
        answer = f"(thought, cut) {thought}"
    elif thought:
        answer = f"(thought) {answer}"
    text = " ".join(answer.split())
    text = text[:LONGEST] + "…" if len(text) > LONGEST else text
    return text or "(nothing)"


def side_by_side(rows: Sequence[dict]) -> str:
    """The questions with a line for each model; an answer that is the one above it is not printed again."""
    by_model: dict[str, list[dict]] = {}
    for row in rows:
        by_model.setdefault(row["model"], []).append(row)
    lineages = {Path(short_name(model)).resolve(): read_lineage(model) for model in by_model}
    stages = {folder: lineage.stage.upper() for folder, lineage in lineages.items() if lineage}
    labels = dict(zip(by_model, axis_names(list(by_model), stages), strict=True))
    width = max(map(len, labels.values()))
    lines = []
    for n in chosen(next(iter(by_model.values()))):
        above = None
        for model, of_model in by_model.items():
            row = of_model[n]  # all models were asked the same, in one order
            is_exam = row["kind"] == "exam"
            if above is None:
                lines += ["", " ".join(row["messages"][-1 if is_exam else -2]["content"].split())]
            answer = shown(row)
            right = f" [right: {row['answer']}]" if is_exam else ""
            lines.append(f"  {labels[model]:{width}}  {'the same' if answer == above else answer + right}")
            above = answer
    return "\n".join(lines[1:])


def main(argv: Sequence[str] | None = None) -> None:
    """Print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("evaluation", type=Path, help="output folder of scripts/evaluate_model.py")
    _, rows = read_evaluation(parser.parse_args(argv).evaluation)
    print(f"{side_by_side(rows)}\n\n{REPORT_NOTICE}")


if __name__ == "__main__":
    run_script(main)
