"""Which GPUs there are, whether torch can use them, and how a user chooses the CPU.

`python -m medtune.devices FLAGS` tells a launcher how many GPUs a script with these flags has, or `cpu` where that was
chosen.
"""

import argparse
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from medtune.errors import UserError, run_script
from medtune.nvidia_smi import ask_nvidia_smi, driver_versions, gpu_names, list_gpus, version_numbers
from medtune.torch_builds import choose_build, dotted, has_kernels

WITHOUT = "--use_cpu True goes on without"


# ---------------------------------------------------------------- the choice


def cpu_reason(use_cpu: bool) -> str:
    """Why a run is on the CPU; "" if it has a GPU.

    Raises UserError if there are GPUs that torch cannot use and the CPU was not chosen.
    """
    if use_cpu:
        return "--use_cpu"
    import torch

    if torch.cuda.is_available():
        _refuse_processes_without_gpu(torch.cuda.device_count())
        _refuse_missing_kernels()
        return ""
    listing = "" if are_hidden() else ask_nvidia_smi("-L")
    if gpu_names(listing):
        raise UserError(_unusable(listing))
    if not listing:
        return "no CUDA device"
    fault = " ".join(listing.split())
    # The driver's file of the first GPU. So it is after an update of the driver, until the machine is restarted.
    if Path("/dev/nvidia0").exists():
        raise UserError(
            f"there is a GPU (/dev/nvidia0) but nvidia-smi fails: {fault}; restart the machine or fix its driver; "
            f"{WITHOUT}"
        )
    return f"no CUDA device (nvidia-smi: {fault})"


def are_hidden() -> bool:
    """Whether CUDA_VISIBLE_DEVICES is empty or -1, which chooses the CPU as --use_cpu does."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip() in ("", "-1")


def add_use_cpu(parser: argparse._ActionsContainer, *other_names: str) -> None:
    """Add --use_cpu as transformers reads it: without a value, or with a boolean."""
    parser.add_argument(
        *("--use_cpu", *other_names),
        nargs="?",
        const=True,
        default=False,
        type=lambda word: word.lower() in ("true", "yes", "t", "y", "1"),
        help="the CPU, though there are GPUs",
    )


# ---------------------------------------------------------------- the GPUs


def visible_gpus() -> list[str]:
    """Those that are both there and in CUDA_VISIBLE_DEVICES, as it calls them."""
    n_gpus = len(gpu_names(ask_nvidia_smi("-L")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(index) for index in range(n_gpus)] if visible is None else visible.split(",")[:n_gpus]


def count_gpus() -> int:
    return len(visible_gpus())


def _unusable(listing: str) -> str:
    """One line: the GPUs, torch's build, why torch cannot use them, and what to do."""
    import torch

    names, (driver, cuda) = Counter(gpu_names(listing)), driver_versions()
    gpus = ", ".join(f"{count} x {name}" for name, count in names.items())
    gpus += f"; driver {driver or 'unknown'}" + (f", which has CUDA {cuda}" if cuda else "")
    build = f"built with CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip()
    if torch.version.cuda is None:
        todo = _install_right_build(driver)
    elif int(first) >= names.total() if first.isdecimal() else first not in listing:
        todo = f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']}: {first} is none of them; they count from 0"
    else:
        todo = f"{_torch_refusal()}; {_install_right_build(driver)}"
    return f"nvidia-smi lists GPUs ({gpus}), torch {torch.__version__} ({build}) can use none: {todo}; {WITHOUT}"


def _install_right_build(driver: str) -> str:
    """The command that installs the build of torch for this driver and these GPUs, or why there is none."""
    import torch

    if not driver:
        return "install a build with a CUDA that the driver has (bash setup.sh --gpu)"
    try:
        build = choose_build(driver, list_gpus())
    except UserError as error:
        return str(error)
    if build.cuda == torch.version.cuda:
        return "this is the right build for the driver: restart the machine, or look for the GPUs' own faults (dmesg)"
    return f"install the build with CUDA {build.cuda}: {sys.executable} -m pip install {' '.join(build.words())}"


def _refuse_missing_kernels() -> None:
    """Raises UserError where torch sees a GPU that it was not compiled for: its first operation there would fail."""
    import torch

    arches = re.findall(r"(sm|compute)_(\d+)(\d)", " ".join(torch.cuda.get_arch_list()))
    kernels = [(int(major), int(minor)) for kind, major, minor in arches if kind == "sm"]
    # PTX, which the driver compiles for any newer GPU.
    oldest = min(((int(major), int(minor)) for kind, major, minor in arches if kind == "compute"), default=(math.inf,))
    for index in range(torch.cuda.device_count() if arches else 0):
        capability = torch.cuda.get_device_capability(index)
        if not has_kernels(kernels, capability) and capability < oldest:
            name = f"GPU {index}, {torch.cuda.get_device_name(index)} (compute capability {dotted(capability)})"
            todo = _install_right_build(driver_versions()[0])
            raise UserError(f"torch {torch.__version__} has no kernels for {name}: {todo}; {WITHOUT}")


def _torch_refusal() -> str:
    """The first sentence of what torch says about it."""
    import torch

    try:
        torch.cuda.init()
    except RuntimeError as error:
        return str(error).partition(". ")[0]
    return "CUDA finds no device"


def _refuse_processes_without_gpu(n_gpus: int) -> None:
    n_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if n_processes > max(n_gpus, 1):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        where = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
        raise UserError(
            f"{n_processes} processes on this machine and {n_gpus} GPU(s) that torch can use{where}: each needs one; "
            f"give torchrun --nproc_per_node {n_gpus}, or the launcher N_PROCESSES={n_gpus}"
        )


# ---------------------------------------------------------------- GPUs that do not reach each other

# RTX 4090 and its like hang when they reach for each other by PCIe with a driver older than this, and accelerate 1.15
# refuses them without these variables, with which they go by way of the machine's memory.
PEERLESS, PEERLESS_BEFORE = "RTX 40", "550.40.07"
WITHOUT_PEERS = {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}


def are_peerless() -> bool:
    """Whether several GPUs need `WITHOUT_PEERS`."""
    names = gpu_names(ask_nvidia_smi("-L"))
    if len(names) < 2 or not any(PEERLESS in name for name in names):
        return False
    return version_numbers(driver_versions()[0]) < version_numbers(PEERLESS_BEFORE)


# ---------------------------------------------------------------- for launchers


def read_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Of a script's flags, those that decide where and in how many processes it runs."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--deepspeed", nargs="?")
    add_use_cpu(parser, "--use-cpu", "--no_cuda", "--no-cuda")
    return parser.parse_known_args(argv)[0]


def main(argv: Sequence[str] | None = None) -> None:
    flags = read_flags(sys.argv[1:] if argv is None else argv)
    chosen = flags.use_cpu or are_hidden()
    if not flags.help:
        cpu_reason(chosen)
    sys.stdout.write(f"{'cpu' if chosen else count_gpus()}\n")


if __name__ == "__main__":
    run_script(main)
