"""Whether the GPUs reach each other: a real all-reduce, and what to set where it hangs."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from medtune.devices import WITHOUT_PEERS, are_peerless
from medtune.machine.findings import FINE, MODEL, MODEL_BYTES, NOTE, WRONG, Finding

ROOT = Path(__file__).resolve().parents[2]
SECONDS_TO_REDUCE = 40
SLOW_LINK = 1e9  # bytes a second; PCIe 3.0 without peer access has several times that
COMMAND = "python -m medtune.launch -m medtune.machine.all_reduce"
SETTINGS = " ".join(f"{name}={value}" for name, value in WITHOUT_PEERS.items())


def check_all_reduce(n_gpus: int, log: Path) -> Iterator[Finding]:
    subject = "NCCL"
    if are_peerless():
        todo = f"need {SETTINGS}: the launchers set it, export it before a torchrun of your own"
        yield Finding(NOTE, subject, f"these GPUs with this driver {todo}")
    measured = all_reduce(n_gpus, log)
    if isinstance(measured, str):
        without_peers = all_reduce(n_gpus, log, **WITHOUT_PEERS)
        if isinstance(without_peers, str):
            todo = f"CUDA_VISIBLE_DEVICES=0 trains on one; NCCL_DEBUG=INFO N_PROCESSES={n_gpus} {COMMAND} says more"
            yield Finding(WRONG, subject, f"the GPUs do not reach each other ({measured}): {todo}")
        else:
            rate = f"{without_peers['bytes_a_second'] / 1e9:.1f} GB/s"
            todo = f"export {SETTINGS}, with which it works at {rate}"
            yield Finding(WRONG, subject, f"the GPUs do not reach each other by peer access ({measured}): {todo}")
        return
    rate, peers = measured["bytes_a_second"], "with" if measured["peer_access"] else "without"
    text = f"{n_gpus} GPUs sum right, {rate / 1e9:.1f} GB/s, {peers} peer access"
    if rate < SLOW_LINK:
        slow = f"enough for an adapter; all gradients of {MODEL} take {MODEL_BYTES / rate:.0f} s a step"
        yield Finding(NOTE, subject, f"{text}: {slow}")
    else:
        yield Finding(FINE, subject, text)


def all_reduce(n_processes: int, log: Path, **variables: str) -> dict | str:
    """What medtune/machine/all_reduce.py measures, or what went wrong."""
    command = [sys.executable, *COMMAND.split()[1:]]
    code = run_limited(command, SECONDS_TO_REDUCE, variables | {"N_PROCESSES": str(n_processes)}, log)
    lines = log.read_text(errors="replace").splitlines()
    if code == 0:
        return json.loads(next(line for line in lines if line.startswith("{")))
    if code is None:
        return f"no answer within {SECONDS_TO_REDUCE} s"
    errors = [line for line in lines if "error" in line.lower()] or lines or [f"exit code {code}"]
    return " ".join(errors[-1].split())[:200]


def run_limited(command: Sequence[str], seconds: float, variables: Mapping[str, str], log: Path) -> int | None:
    """Run it from the root, with more variables; its exit code, or None if it had to be killed after these seconds."""
    environment = os.environ | variables | {"LAUNCHER_PID": str(os.getpid())}  # so that it ends with this process
    options = {"cwd": ROOT, "env": environment, "stdin": subprocess.DEVNULL, "start_new_session": True}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, **options)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its processes may hang in NCCL
            process.wait()
