"""Disk, shared memory and memory: how much there is, and how fast the disk takes it."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from medtune.machine.findings import FINE, GIB, MIB, MODEL, MODEL_BYTES, NOTE, WRONG, Finding

SECONDS_OF_WRITING = 5
SLOW_DISK = 50e6  # bytes a second
# Of the model: as it comes, merged, and what the stages leave.
ROOM = 4 * MODEL_BYTES
# While it loads, a process holds the weights and a file of them.
LOADING = 1.3 * MODEL_BYTES
SHARED_MEMORY = GIB


def check_output_disk(folder: Path) -> Iterator[Finding]:
    """Room and write rate where the runs write."""
    subject = "disk"
    try:
        free, rate = shutil.disk_usage(folder).free, write_rate(folder)
    except OSError as error:
        todo = "name a folder that takes files with --output_dir"
        yield Finding(WRONG, subject, f"{folder.resolve()}: {error.strerror}; {todo}")
        return
    text = f"{free / 1e9:.0f} GB free in {folder.resolve()}, written at {rate / 1e6:.0f} MB/s"
    size = f"{MODEL} is {MODEL_BYTES / 1e9:.0f} GB as it comes and again merged"
    if free < MODEL_BYTES:
        yield Finding(WRONG, subject, f"{text}: {size}; rent more, or name a folder on another disk with --output_dir")
    elif free < ROOM:
        yield Finding(NOTE, subject, f"{text}: {size}, and each checkpoint of all its weights takes as much")
    elif rate < SLOW_DISK:
        yield Finding(
            NOTE, subject, f"{text}: {MODEL_BYTES / rate:.0f} s for all weights of {MODEL}; a larger --save_steps"
        )
    else:
        yield Finding(FINE, subject, text)


def write_rate(folder: Path) -> float:
    """Bytes a second, on the disk and not in its cache; of 256 MiB, or of what some seconds take."""
    block, start, written = os.urandom(16 * MIB), time.perf_counter(), 0
    with tempfile.TemporaryFile(dir=folder) as file:
        while written < 256 * MIB and time.perf_counter() - start < SECONDS_OF_WRITING:
            written += file.write(block)
            file.flush()
            os.fsync(file.fileno())
    return written / (time.perf_counter() - start)


def check_shared_memory(n_gpus: int, folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Containers have 64 MiB of it by themselves."""
    size = shutil.disk_usage(folder).total if folder.is_dir() else 0
    text = f"{size / GIB:.2g} GiB"
    if size < SHARED_MEMORY:
        todo = "NCCL needs it between GPUs: start the container with --shm-size 8g or --ipc host"
        yield Finding(WRONG if n_gpus > 1 else NOTE, "shared memory", f"{text}; {todo}")
    else:
        yield Finding(FINE, "shared memory", text)


def check_memory(n_gpus: int, root: Path = Path("/")) -> Iterator[Finding]:
    n_processes, available = max(n_gpus, 1), available_memory(root)
    text, needed = f"{available / GIB:.1f} GiB available", LOADING * n_processes
    if available < needed:
        why = f"{n_processes} process(es) that load {MODEL} need {needed / GIB:.0f} GiB"
        yield Finding(NOTE, "memory", f"{text}: {why}")
    else:
        yield Finding(FINE, "memory", text)


def available_memory(root: Path) -> int:
    """Bytes that a process of this machine, or of this container, can still have."""
    lines = (root / "proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    groups = root / "sys/fs/cgroup"
    for limit, used in (  # of version 2, and of version 1
        (groups / "memory.max", groups / "memory.current"),
        (groups / "memory/memory.limit_in_bytes", groups / "memory/memory.usage_in_bytes"),
    ):
        if limit.is_file() and (bytes_ := limit.read_text().strip()).isdecimal():
            available = min(available, int(bytes_) - int(used.read_text()))
    return available
