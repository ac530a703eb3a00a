"""What a run takes, before a GPU is rented for it: memory, on which cards it fits, hours, money and disk.

    python scripts/estimate_run.py run_sft.sh --per_device_train_batch_size 4
    python scripts/estimate_run.py --gpus 1 --assume_tokens 600 supervised_finetuning.py --model_name_or_path ...
    ESTIMATE=1 bash run_sft.sh
    ESTIMATE=1 DO_PT=0 ALIGN=dpo bash run_all.sh

Behind its own flags stands the command of a stage as it will be started, with its launcher or its script, or that of
run_all.sh, whose stages are added up. A stage's flags are read by its parser, its data by its own reading, and its
model, adapters and one step on the longest batch run on tensors that have shapes and no memory; no weights are
downloaded. Nothing is measured: a card's verdict is computed, and "fits" leaves a tenth of its memory free.
docs/results.md compares such estimates with runs.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from medtune.errors import UserError, run_script
from medtune.estimate.cards import Price, choose_cards, read_prices
from medtune.launch import RUN_VARIABLES

# The base of an adapter that an earlier stage has yet to leave.
ASSUMED_BASE = "Qwen/Qwen2.5-3B-Instruct"
RUN_ALL = "run_all.sh"
OWN_FLAGS = {"--gpus", "--card", "--price", "--assume_tokens", "--base_model", "--json"}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, help="GPUs of the run; without it those of CUDA_VISIBLE_DEVICES")
    parser.add_argument("--card", default="", help="only these cards, with commas, such as 4090,A100")
    parser.add_argument("--price", type=float, help="of one GPU for an hour, in place of docs/prices.csv")
    parser.add_argument("--assume_tokens", type=int, help="tokens of an average row, without reading the data")
    parser.add_argument(
        "--base_model",
        default="",
        help=f"the base of an adapter that an earlier stage has yet to leave; {ASSUMED_BASE} without it",
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--for_launcher", action="store_true", help="on a machine with GPUs: a line, and its figure")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a launcher or a stage's script, and its flags")
    return parser


def commands_of(launcher: str, flags: Sequence[str]) -> list[dict]:
    """The stages' commands that a launcher would start, each with the variables of its environment that count."""
    path = Path(launcher)
    if not path.is_file():
        raise UserError(f"{launcher}: no such file; give a launcher such as run_sft.sh, or a stage's script")
    if path.name != RUN_ALL and "medtune.launch" not in path.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"{launcher}: starts no training stage; give run_sft.sh, run_all.sh or the like")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "commands")
        environment = os.environ | {"ESTIMATE": "1", "ESTIMATE_COMMANDS": str(file), "PYTHON": sys.executable}
        words = ["bash", launcher, *flags]
        code = subprocess.run(words, env=environment, stdout=sys.__stderr__, check=False).returncode
        if code:
            sys.exit(code)
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def enter_environment(variables: Mapping[str, str]) -> None:
    for name in RUN_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(variables)


def estimate_stages(commands: Sequence[dict], args: argparse.Namespace, *, of_run_all: bool) -> None:
    """Print the estimates of stages' scripts with their flags, and what all take together."""
    cards = choose_cards([name for name in args.card.split(",") if name.strip()])
    prices = {card.name: Price(args.price, "") for card in cards} if args.price else read_prices()
    # Here, since they take seconds, and a command may be none.
    import medtune.libraries  # noqa: F401 - first: it imports the libraries in half of their time

    # isort: split
    import datasets
    import torch
    from loguru import logger
    from transformers.utils import logging as transformers_logging

    from medtune.estimate.making import Command, line_before_a_run, make_estimate
    from medtune.estimate.plan import count_gpus_of_command, load_stage
    from medtune.estimate.report import as_json, as_lines
    from medtune.estimate.total import as_total_lines, total_as_json

    if args.for_launcher and not torch.cuda.is_available():
        raise UserError("--for_launcher: torch can use no GPU here; leave the flag out")
    # As in a run: transformers 5.24 and PEFT 0.21 still call each other by names that transformers renamed.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logger.remove()  # what a stage says of its data stands in the estimate
    estimates = []
    for started in commands:
        if started["variables"] is not None:
            enter_environment(started["variables"])
        script, *flags = started["command"]
        base = args.base_model or os.environ.get("ESTIMATE_BASE", ASSUMED_BASE)
        n_gpus = args.gpus or count_gpus_of_command()
        command = Command(load_stage(script), flags, n_gpus, base, args.assume_tokens)
        if args.for_launcher:
            line, gib = line_before_a_run(command, torch.cuda.get_device_properties(0).total_memory / 2**30)
            print(line, file=sys.stderr)
            print(f"{gib:.3f}")
            return
        try:
            estimates.append(make_estimate(command, cards, prices))
        except UserError as error:
            raise UserError(f"{Path(script).name}: {error}" if of_run_all else str(error)) from error
        if not args.json:
            print("\n".join([*as_lines(estimates[-1]), *[""] * of_run_all]), flush=True)
    if args.json:
        stages = [as_json(estimate) for estimate in estimates]
        whole = {"stages": stages, "total": total_as_json(estimates)} if of_run_all else stages[0]
        print(json.dumps(whole, indent=2))
    elif of_run_all:
        print("\n".join(as_total_lines(estimates)))


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    args = make_parser().parse_args(words)
    for name in ("gpus", "assume_tokens", "price"):
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} {value}: give a number above 0")
    if not args.command:
        raise UserError("no command to estimate: give a launcher and its flags, such as run_sft.sh")
    script, *flags = args.command
    if own := OWN_FLAGS & {flag.partition("=")[0] for flag in flags}:
        name = min(own)
        raise UserError(
            f"{name}: a flag of the estimate, which stands before the command: estimate_run.py {name} ... {script}"
        )
    is_launcher = script.endswith(".sh")
    commands = commands_of(script, flags) if is_launcher else [{"command": args.command, "variables": None}]
    if commands:  # not of --help
        estimate_stages(commands, args, of_run_all=Path(script).name == RUN_ALL)


if __name__ == "__main__":
    run_script(main)
