"""Three steps of SFT, DPO, RM and PPO of a tiny model, by the launchers themselves, on every GPU."""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from medtune.devices import visible_gpus
from medtune.machine.between_gpus import run_limited
from medtune.machine.findings import FINE, WRONG, Finding

SECONDS_OF_A_STAGE = 600
# What the launchers read and the short runs are not to take from outside.
FROM_OUTSIDE = ("ESTIMATE", "DEEPSPEED", "NNODES", "N_PROCESSES", "TRAIN_DATA", "EVAL_DATA", "VLLM_GPUS")
BATCH, ACCUMULATION, N_STEPS = 2, 2, 3
FLAGS = "--logging_steps 1 --eval_strategy no --report_to none --resume_from_checkpoint False"
FLAGS += " --preprocessing_num_workers 1"
SUPERVISED = f"--max_steps {N_STEPS} --max_train_samples 64 --max_eval_samples 8"


def check_training(output_dir: Path) -> Iterator[Finding]:
    """Stops at the first command that fails, whose log stays in `output_dir`; otherwise nothing does."""
    folder = Path(tempfile.mkdtemp(prefix="outputs-check-", dir=output_dir)).resolve()
    code: int | None = 0
    try:
        for name, (command, variables) in _commands(folder).items():
            log, start = folder / f"{name}.log", time.perf_counter()
            code = run_limited(command, SECONDS_OF_A_STAGE, variables, log)
            if code != 0:
                fault = f"no end within {SECONDS_OF_A_STAGE} s" if code is None else f"exit code {code}"
                last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
                yield Finding(WRONG, name, f"{fault}; {' '.join(last)[:300]}; all that it said: {log}")
                return
            yield Finding(FINE, name, f"done in {time.perf_counter() - start:.0f} s")
    finally:  # after Ctrl-C too
        if code == 0:
            shutil.rmtree(folder)


def _commands(folder: Path) -> dict[str, tuple[list[str], Mapping[str, str]]]:
    """By what is printed: the command, and its variables."""
    gpus = visible_gpus()
    shared = {
        **dict.fromkeys(FROM_OUTSIDE, ""),
        "PYTHON": sys.executable,
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": os.environ.get(
            "CUDA_VISIBLE_DEVICES", ",".join(gpus)
        ),  # also where a launcher takes one
        "TEMPLATE": "chatml",
        "BATCH": str(BATCH),
        "ACCUMULATION": str(ACCUMULATION),
        "EPISODES": str(N_STEPS * BATCH * ACCUMULATION * max(len(gpus), 1)),
    }
    model, sft, rm = folder / "model", folder / "sft/checkpoint-best", folder / "rm/checkpoint-best"
    prompts = {"TRAIN_DATA": "data/ppo", "EVAL_DATA": "data/ppo"}
    stages = {
        "sft": (SUPERVISED, {"MODEL": str(model)}),
        "dpo": (SUPERVISED, {"MODEL": str(sft)}),
        "rm": (SUPERVISED, {"MODEL": str(sft)}),
        "ppo": ("--response_length 32", {"MODEL": str(sft), "REWARD_MODEL": str(rm), **prompts}),
    }
    build = [sys.executable, "scripts/build_tiny_model.py", "--output_dir", str(model)]
    commands: dict[str, tuple[list[str], Mapping[str, str]]] = {"tiny model": (build, shared)}
    for name, (flags, own) in stages.items():
        launcher = ["bash", f"run_{name}.sh", "--cache_dir", str(folder / "cache"), *FLAGS.split(), *flags.split()]
        commands[f"{name}, {N_STEPS} steps"] = (launcher, shared | own | {"OUTPUT": str(folder / name)})
    return commands
