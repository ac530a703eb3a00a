"""The estimates of the guide's five commands, as the launchers have them, for some models and machines: two tables.

python tests/estimate_guide.py > guide.md             # five minutes of one core; docs/estimate.md has the tables
"""

import os
import subprocess
import sys
import tempfile
import warnings
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ |= {"CUDA_VISIBLE_DEVICES": "0", "HF_HUB_OFFLINE": "1"}

import medtune.libraries  # noqa: E402, F401

# isort: split
from loguru import logger  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from medtune.estimate.cards import choose_cards  # noqa: E402
from medtune.estimate.hours import estimate_hours  # noqa: E402
from medtune.estimate.making import Command, make_estimate, measure_command  # noqa: E402
from medtune.estimate.memory import GIB, share  # noqa: E402
from medtune.estimate.plan import load_stage  # noqa: E402

MODELS = ("Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen3-4B", "Qwen/Qwen3-8B")
MACHINES = ((2, "RTX 4090"), (1, "A100 40GB"), (2, "A100 40GB"), (1, "A100 80GB"), (1, "RTX 5090"))
STAGES = ("pt", "sft", "rm", "dpo", "ppo")
# Of an average text, dialogue, pair and prompt.
TOKENS = {"pt": 1024, "sft": 600, "rm": 600, "dpo": 600, "ppo": 300}
# Hours on two A100 of 40 GB.
GUIDE = {"pt": "12 to 18 h", "sft": "4 to 6 h", "rm": "2 to 3 h", "dpo": "4 to 6 h", "ppo": "not given"}


def command_of(stage: str, model: str, tokens: int, n_gpus: int = 1) -> Command:
    """What the launcher of a stage starts; beyond SFT from an adapter that is to come."""
    with tempfile.TemporaryDirectory() as folder:
        stand_in = Path(folder, "python")
        stand_in.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n", encoding="utf-8")
        stand_in.chmod(0o755)
        start = model if stage in ("pt", "sft") else "outputs-sft/checkpoint-best"
        environment = os.environ | {"PYTHON": str(stand_in), "MODEL": start}
        words = subprocess.run(
            ["bash", f"run_{stage}.sh"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
        ).stdout.splitlines()
    _, _, script, *flags = words
    return Command(load_stage(script), flags, n_gpus, model, tokens)


def cells(stage: str, model: str, tokens: int) -> list[str]:
    """For each machine the memory of a GPU and the hours."""
    own, texts = measure_command(command_of(stage, model, tokens)), []
    for n_gpus, name in MACHINES:
        (card,) = choose_cards([name])
        plan, memory, flags = replace(own.plan, n_gpus=n_gpus), deepcopy(own.memory), []
        if n_gpus > 1:
            share(memory, plan)
        rows = own.rows
        if memory.total > 0.9 * card.gib * GIB:
            (verdict,) = make_estimate(command_of(stage, model, tokens, n_gpus), [card], {}).verdicts
            if verdict.measured is None:
                texts.append("does not fit")
                continue
            plan, rows, memory = verdict.measured.plan, verdict.measured.rows, verdict.measured.memory
            flags = verdict.measured.flags
        low, high = estimate_hours(plan, memory, rows, card).total
        texts.append(
            f"{memory.total / GIB:.1f} GiB, {low:.1f} to {high:.1f} h" + (f", `{' '.join(flags)}`" * bool(flags))
        )
    return texts


def main() -> None:
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    logger.remove()
    header = [f"{n} x {card}" for n, card in MACHINES]
    print(f"| model | stage | {' | '.join(header)} |")
    print("|---|---|" + "---|" * len(header))
    first: dict[str, list[str]] = {}
    for model in MODELS:
        for stage in STAGES:
            texts = cells(stage, model, TOKENS[stage])
            first.setdefault(stage, texts)
            print(f"| {model.partition('/')[2]} | {stage} | {' | '.join(texts)} |", flush=True)
    print("\n| stage | the guide | estimate |")
    print("|---|---|---|")
    index = MACHINES.index((2, "A100 40GB"))
    for stage in STAGES:
        print(f"| {stage} | {GUIDE[stage]} | {first[stage][index].partition(', ')[2]} |")


if __name__ == "__main__":
    main()
