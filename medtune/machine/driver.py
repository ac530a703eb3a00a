"""torch, the driver and the GPUs as nvidia-smi lists them; torch may be absent."""

import importlib.metadata
import importlib.util
from collections.abc import Iterator

from medtune.devices import are_hidden, cpu_reason
from medtune.errors import UserError
from medtune.machine.findings import FINE, GIB, MIB, MODEL, NOTE, WRONG, Finding
from medtune.nvidia_smi import NO_ANSWER, ask_nvidia_smi, driver_versions, list_gpus, query
from medtune.torch_builds import choose_build, describe, tested_torch

# Of a GPU's memory; less is what the driver itself takes.
USED_BY_OTHERS = 0.05


def check_driver() -> Finding | None:
    """What is wrong where nvidia-smi hangs; None where it answers, or is not there."""
    if ask_nvidia_smi("-L") != NO_ANSWER:
        return None
    todo = "restart the machine, or rent another; GPUs and torch are not checked"
    return Finding(WRONG, "driver", f"nvidia-smi hangs ({NO_ANSWER}): {todo}")


def check_torch() -> Iterator[Finding]:
    """Whether the installed torch, or the one that setup.sh will install, runs on this driver and these GPUs."""
    try:
        if importlib.util.find_spec("torch"):
            yield from _check_installed(importlib.metadata.version("torch"))
        else:
            yield _build_to_install()
    except UserError as error:
        yield Finding(WRONG, "torch", str(error))


def _build_to_install() -> Finding:
    gpus, (driver, cuda) = list_gpus(), driver_versions()
    if not gpus:
        return Finding(NOTE, "torch", "not installed: bash setup.sh; nvidia-smi lists no GPU")
    build = choose_build(driver, gpus)
    todo = f"bash setup.sh --gpu installs the build with CUDA {build.cuda}"
    return Finding(NOTE, "torch", f"not installed; driver {driver} (CUDA {cuda}), {describe(gpus)}: {todo}")


def _check_installed(version: str) -> Iterator[Finding]:
    reason = cpu_reason(False)
    gpus, (driver, cuda) = list_gpus(), driver_versions()
    if version.partition("+")[0] != tested_torch():
        todo = f"bash setup.sh --gpu puts {tested_torch()} into .venv"
        yield Finding(NOTE, "torch", f"{version} is not the tested version: {todo}")
    if not reason:
        yield Finding(FINE, "torch", f"{version} runs on driver {driver} (CUDA {cuda}) and {describe(gpus)}")
        return
    if gpus and are_hidden():
        reason = f"CUDA_VISIBLE_DEVICES hides {describe(gpus)}"
    slow = f"runs go on the CPU, which does for a tiny model; {MODEL} takes weeks there"
    yield Finding(NOTE, "torch", f"{version}; {reason}: {slow}")
    yield Finding(NOTE, "GPU", "without one bfloat16, bitsandbytes, FlashAttention and NCCL are not checked")


def check_gpus() -> Iterator[Finding]:
    """Each GPU's memory, and who else uses it."""
    users = query("compute-apps", "gpu_uuid", "pid", "process_name")
    for index, name, uuid, *memory in query("gpu", "index", "name", "uuid", "memory.total", "memory.used"):
        subject = f"GPU {index}"
        if not all(amount.isdecimal() for amount in memory):  # [N/A] where it is the machine's
            yield Finding(NOTE, subject, f"{name}; nvidia-smi does not say its memory")
            continue
        total, used = (int(amount) * MIB for amount in memory)
        text = f"{name}, {total / GIB:.1f} GiB, {(total - used) / GIB:.1f} of them free"
        others = ", ".join(f"{program} (pid {pid})" for owner, pid, program in users if owner == uuid)
        if others or used > USED_BY_OTHERS * total:
            who = others or "processes that this container does not see"
            yield Finding(NOTE, subject, f"{text}; used by {who}: end them, or leave it out of CUDA_VISIBLE_DEVICES")
        else:
            yield Finding(FINE, subject, text)
