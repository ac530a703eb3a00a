"""Start a stage with python if it is one process, otherwise with torchrun, one process per GPU.

With ESTIMATE set the run is estimated and not started (scripts/estimate_run.py); with ESTIMATE_COMMANDS its command is
added to that file, for the script to read.
With VLLM_GPUS above 0 vLLM servers are started first, which write PPO's and GRPO's replies (medtune/rl/vllm_launch.py).
NNODES, NODE_RANK and MASTER_ADDR set several nodes; N_PROCESSES sets the number of processes on this one.
torchrun forwards a signal, gives the processes half a minute to save a checkpoint, and exits with 1 and a traceback.
Here they have ten minutes, and the exit code is theirs: 143 after SIGTERM, 130 after Ctrl-C, 2 for a mistake. If the
launcher itself is killed, they get SIGTERM (`errors.run_script`).

    python -m medtune.launch supervised_finetuning.py --model_name_or_path ...
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from medtune.devices import WITHOUT_PEERS, are_hidden, are_peerless, count_gpus, cpu_reason, read_flags
from medtune.errors import UserError, run_script

SECONDS_TO_SAVE = 600
ESTIMATE_RUN = str(Path(__file__).resolve().parents[1] / "scripts/estimate_run.py")
# The stages that VLLM_GPUS is for; in run_all.sh it stands before others too.
WITH_ROLLOUTS = {"ppo_training.py", "grpo_training.py", "distillation_training.py"}
# What decides, beside the flags, where a run is and on how many GPUs; and the base of adapters that are to come.
RUN_VARIABLES = ("CUDA_VISIBLE_DEVICES", "N_PROCESSES", "NNODES", "VLLM_GPUS", "VLLM_MEMORY", "ESTIMATE_BASE")


def count_nodes(environment: Mapping[str, str]) -> int:
    """Raises UserError for what is no number of machines."""
    value = environment.get("NNODES") or "1"
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"NNODES={value}: give the number of machines")
    return int(value)


def is_one_of_several_nodes(environment: Mapping[str, str]) -> bool:
    return count_nodes(environment) > 1


def rendezvous(environment: Mapping[str, str]) -> list[str]:
    """How the processes find each other, as flags of torchrun."""
    if not is_one_of_several_nodes(environment):
        return ["--standalone"]
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR") if not environment.get(name)]
    if missing:
        raise UserError(
            f"NNODES={environment['NNODES']} needs {' and '.join(missing)}: NODE_RANK counts the nodes from 0, "
            "MASTER_ADDR is the address of node 0"
        )
    return [
        *("--nnodes", environment["NNODES"], "--node_rank", environment["NODE_RANK"]),
        *("--master_addr", environment["MASTER_ADDR"], "--master_port", environment.get("MASTER_PORT", "29500")),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    script_and_flags = list(sys.argv[1:] if argv is None else argv)
    flags = read_flags(script_and_flags)
    if os.environ.get("ESTIMATE", "") not in ("", "0") and not flags.help:
        if file := os.environ.get("ESTIMATE_COMMANDS"):
            hand_over_command(Path(file), script_and_flags)
            return
        os.execv(sys.executable, [sys.executable, ESTIMATE_RUN, *script_and_flags])
    has_servers = os.environ.get("VLLM_GPUS", "") not in ("", "0") and {*script_and_flags} & WITH_ROLLOUTS
    if has_servers and not flags.help:
        os.execv(sys.executable, [sys.executable, "-m", "medtune.rl.vllm_launch", *script_and_flags])
    on_cpu = flags.use_cpu or are_hidden()
    n_gpus = 0 if on_cpu else count_gpus()
    requested = os.environ.get("N_PROCESSES") or str(max(n_gpus, 1))
    if not requested.isdecimal():
        raise UserError(f"N_PROCESSES={requested}: give a number of processes, one a GPU")
    n_processes = max(int(requested), 1)
    if n_gpus and not flags.help:
        note_estimate(n_processes * count_nodes(os.environ), script_and_flags)
    if flags.help or (n_processes == 1 and not is_one_of_several_nodes(os.environ) and not flags.deepspeed):
        os.execv(sys.executable, [sys.executable, *script_and_flags])
    cpu_reason(on_cpu)  # once, before as many processes meet it
    if n_processes > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, with four lines of warning
        if not on_cpu and are_peerless():
            os.environ.update(WITHOUT_PEERS | os.environ)
    torchrun([*rendezvous(os.environ), "--nproc_per_node", str(n_processes), *script_and_flags])


def hand_over_command(file: Path, script_and_flags: Sequence[str]) -> None:
    """Append a line of JSON: the command, and the variables that it is started with."""
    variables = {name: os.environ[name] for name in RUN_VARIABLES if name in os.environ}
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"command": list(script_and_flags), "variables": variables}) + "\n")


def note_estimate(n_gpus: int, script_and_flags: Sequence[str]) -> None:
    """Print what the run will take of a GPU's memory, and leave the figure to the run, whose results keep it beside the
    truth.
    """
    words = ["--for_launcher", "--gpus", str(n_gpus), *script_and_flags]
    answer = subprocess.run([sys.executable, ESTIMATE_RUN, *words], capture_output=True, text=True, check=False)
    if answer.returncode == 0:  # what is wrong with the command, the stage itself says
        sys.stderr.write(answer.stderr)
        os.environ["ESTIMATED_GIB"] = answer.stdout.strip()


def torchrun(words: Sequence[str]) -> None:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as run

    os.environ["LAUNCHER_PID"] = str(os.getpid())
    try:
        run(["--shutdown_timeout", str(SECONDS_TO_SAVE), *words])
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    except ChildFailedError as failed:
        # The process has said what went wrong.
        code = failed.get_first_failure()[1].exitcode
        sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    run_script(main)
