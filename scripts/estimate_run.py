"""What a run takes, before a GPU is rented for it: memory, on which cards it fits, hours, money and disk.

    python scripts/estimate_run.py run_sft.sh --per_device_train_batch_size 4
    python scripts/estimate_run.py --gpus 1 --assume_tokens 600 supervised_finetuning.py --model_name_or_path ...
    ESTIMATE=1 bash run_sft.sh
    ESTIMATE=1 DO_PT=0 ALIGN=dpo bash run_all.sh

Behind its own flags stands the command of a stage as it will be started, with its launcher or its script. The stage's
flags are read by the stage's parser, its data by its own reading, and its model, adapters and one step on the longest
batch run on tensors that have shapes and no memory; no weights are downloaded. Nothing is measured: a card's verdict is
computed, and "fits" leaves a tenth of its memory free. docs/results.md compares such estimates with runs.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from medtune.errors import UserError, run_script
from medtune.estimate.cards import Price, choose_cards, read_prices

# The base of an adapter that an earlier stage has yet to leave.
ASSUMED_BASE = "Qwen/Qwen2.5-3B-Instruct"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, help="GPUs of the run; without it those of CUDA_VISIBLE_DEVICES")
    parser.add_argument("--card", default="", help="only these cards, with commas, such as 'RTX 4090,H200'")
    parser.add_argument("--price", type=float, help="of one GPU for an hour, in place of docs/prices.csv")
    parser.add_argument("--assume_tokens", type=int, help="tokens of an average row, without reading the data")
    parser.add_argument(
        "--base_model",
        default=os.environ.get("ESTIMATE_BASE", ASSUMED_BASE),
        help="the base of an adapter that an earlier stage has yet to leave",
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--for_launcher", action="store_true", help="on a machine with GPUs: a line, and its figure")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a launcher or a stage's script, and its flags")
    return parser


def through_launcher(launcher: str, flags: Sequence[str], own_words: Sequence[str]) -> None:
    """Let a launcher add its flags: it starts this script again, behind its own words."""
    path = Path(launcher)
    if not path.is_file():
        raise UserError(f"{launcher}: no such file; give a launcher such as run_sft.sh, or a stage's script")
    if path.name != "run_all.sh" and "medtune.launch" not in path.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"{launcher}: starts no training stage; give run_sft.sh, run_all.sh or the like")
    environment = os.environ | {"ESTIMATE": json.dumps(own_words), "PYTHON": sys.executable}
    code = subprocess.run(["bash", launcher, *flags], env=environment, check=False).returncode
    if code:
        sys.exit(code)


def estimate_stage(script: str, flags: Sequence[str], args: argparse.Namespace) -> None:
    """Print the estimate of a stage's script and its flags."""
    cards = choose_cards([name for name in args.card.split(",") if name.strip()])
    prices = {card.name: Price(args.price, "") for card in cards} if args.price else read_prices()
    # Here, since a launcher is passed on without them, and they take seconds.
    import medtune.libraries  # noqa: F401 - first: it imports the libraries in half of their time

    # isort: split
    import datasets
    import torch
    from loguru import logger
    from transformers.utils import logging as transformers_logging

    from medtune.estimate.making import Command, line_before_a_run, make_estimate
    from medtune.estimate.plan import count_gpus_of_command, load_stage
    from medtune.estimate.report import as_json, as_lines

    if args.for_launcher and not torch.cuda.is_available():
        raise UserError("--for_launcher: torch can use no GPU here; leave the flag out")
    # As in a run: transformers 5.24 and PEFT 0.21 still call each other by names that transformers renamed.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logger.remove()  # what a stage says of its data stands in the estimate
    n_gpus = args.gpus or count_gpus_of_command()
    command = Command(load_stage(script), flags, n_gpus, args.base_model, args.assume_tokens)
    if args.for_launcher:
        line, gib = line_before_a_run(command, torch.cuda.get_device_properties(0).total_memory / 2**30)
        print(line, file=sys.stderr)
        print(f"{gib:.3f}")
        return
    estimate = make_estimate(command, cards, prices)
    print(json.dumps(as_json(estimate), indent=2) if args.json else "\n".join(as_lines(estimate)))


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    args = make_parser().parse_args(words)
    for name in ("gpus", "assume_tokens", "price"):
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} {value}: give a number above 0")
    if not args.command:
        raise UserError("no command to estimate: give a launcher and its flags, such as run_sft.sh")
    script, *flags = args.command
    if script.endswith(".sh"):
        through_launcher(script, flags, words[: len(words) - len(args.command)])
    else:
        estimate_stage(script, flags, args)


if __name__ == "__main__":
    run_script(main)
