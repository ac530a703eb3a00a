"""Check a rented machine before its hours are paid for: driver, GPUs, what is between them, disk, memory, hub, clock.

It starts without any package, before setup.sh has run, and checks more where torch is installed.

    python scripts/check_machine.py
    python scripts/check_machine.py --train     # three steps of SFT, DPO, RM and PPO on every GPU too
"""

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from medtune.errors import UserError, run_script
from medtune.machine.between_gpus import check_all_reduce
from medtune.machine.computing import check_computing
from medtune.machine.driver import check_driver, check_gpus, check_torch
from medtune.machine.findings import FINE, NOTE, WRONG, Finding
from medtune.machine.hub import check_hub
from medtune.machine.short_runs import check_training
from medtune.machine.storage import check_memory, check_output_disk, check_shared_memory

ROOT = Path(__file__).resolve().parents[1]


def usable_gpus() -> int:
    """How many torch has; 0 where it is not installed."""
    if not importlib.util.find_spec("torch"):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def check(output_dir: Path, train: bool) -> Iterator[Finding]:
    hanging = check_driver()
    if hanging:  # so would whatever asks for a GPU
        yield hanging
    else:
        yield from check_torch()
        yield from check_gpus()
    n_gpus = 0 if hanging else usable_gpus()
    if n_gpus:
        yield from check_computing([f"cuda:{index}" for index in range(n_gpus)])
    if n_gpus > 1:
        with tempfile.TemporaryDirectory() as folder:
            yield from check_all_reduce(n_gpus, Path(folder) / "log")
    yield from check_output_disk(output_dir)
    yield from check_shared_memory(n_gpus)
    yield from check_memory(n_gpus)
    yield from check_hub()
    if train and not hanging:
        yield from check_training(output_dir)


def main(argv: list[str] | None = None) -> None:
    """Print a line for each finding; exit with 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=ROOT, help="the folder where the runs will write")
    parser.add_argument("--train", action="store_true", help="also three steps of SFT, DPO, RM and PPO on every GPU")
    args = parser.parse_args(argv)
    if not args.output_dir.is_dir():
        raise UserError(f"--output_dir {args.output_dir}: no such folder; make it, or name one that is there")

    grades = []
    for finding in check(args.output_dir, args.train):
        grades.append(finding.grade)
        print(finding, flush=True)
    print(f"{grades.count(WRONG)} wrong, {grades.count(NOTE)} to note, {grades.count(FINE)} fine")
    sys.exit(int(WRONG in grades))


if __name__ == "__main__":
    run_script(main)
