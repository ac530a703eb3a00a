"""The estimates of the guide's five commands, as the launchers have them, for some models and machines: two tables.

python tests/estimate_guide.py > guide.md             # ten minutes of one core; docs/estimate.md has the tables
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen3-4B", "Qwen/Qwen3-8B")
MACHINES = ((2, "RTX 4090"), (1, "A100 40GB"), (2, "A100 40GB"), (1, "A100 80GB"), (1, "RTX 5090"))
STAGES = ("pt", "sft", "rm", "dpo", "ppo")
# Of an average text, dialogue, pair and prompt.
TOKENS = {"pt": 1024, "sft": 600, "rm": 600, "dpo": 600, "ppo": 300}
# Hours on two A100 of 40 GB.
GUIDE = {"pt": "12 to 18", "sft": "4 to 6", "rm": "2 to 3", "dpo": "4 to 6", "ppo": "not given"}


def estimate(model: str, stage: str, n_gpus: int, cards: list[str], tokens: int) -> dict:
    """What scripts/estimate_run.py says of a launcher."""
    own = [
        "--json",
        "--gpus",
        str(n_gpus),
        "--assume_tokens",
        str(tokens),
        "--base_model",
        model,
        "--card",
        ",".join(cards),
    ]
    environment = os.environ | {"MODEL": model if stage in ("pt", "sft") else "outputs-sft/checkpoint-best"}
    flags = ["--max_train_samples", "10000"] if stage == "ppo" else []
    words = [sys.executable, "scripts/estimate_run.py", *own, f"run_{stage}.sh", *flags]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def cell(card: dict) -> str:
    if not card["fits"]:
        return "does not fit"
    change = f", {' '.join(card['flags'])}" if card["flags"] else ""
    return f"{card['gib']:.1f} GiB, {card['hours'][0]:.1f} to {card['hours'][1]:.1f} h{change}"


def main() -> None:
    header = [f"{n} x {card}" for n, card in MACHINES]
    print(f"| model | stage | {' | '.join(header)} |")
    print("|---|---|" + "---|" * len(header))
    counts = sorted({n for n, _ in MACHINES})
    for model in MODELS:
        for stage in STAGES:
            cells = {}
            for n_gpus in counts:
                cards = [card for n, card in MACHINES if n == n_gpus]
                found = estimate(model, stage, n_gpus, cards, TOKENS[stage])["cards"]
                cells |= {(n_gpus, card["card"]): cell(card) for card in found}
            name = model.partition("/")[2]
            print(f"| {name} | {stage} | {' | '.join(cells[machine] for machine in MACHINES)} |", flush=True)
    print("\n| stage | the guide | rows of the assumed length | rows of 4 times that |")
    print("|---|---|---|---|")
    for stage in STAGES:
        lengths = [TOKENS[stage], min(4 * TOKENS[stage], 1024 if stage == "pt" else 2048)]
        found = [estimate(MODELS[0], stage, 2, ["A100 40GB"], tokens)["cards"][0]["hours"] for tokens in lengths]
        print(
            f"| {stage} | {GUIDE[stage]} h | " + " | ".join(f"{low:.1f} to {high:.1f} h" for low, high in found) + " |"
        )


if __name__ == "__main__":
    main()
