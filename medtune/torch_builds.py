"""Which build of torch runs with this driver and on these GPUs; torch itself need not be installed.

`python -m medtune.torch_builds` tells setup.sh on two lines the words for pip, and why; nothing where
nvidia-smi lists no GPU.

The table is of torch 2.13: builds by PyTorch's RELEASE.md and the index below, kernels by
torch.cuda.PYTORCH_RELEASES_CODE_CC, drivers by docs.nvidia.com/deploy/cuda-compatibility, whose "Minor Version
Compatibility" has all of CUDA 12 run from driver 525.60.13 on and all of CUDA 13 from 580.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from medtune.errors import UserError, run_script
from medtune.nvidia_smi import Gpu, driver_versions, list_gpus, version_numbers

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"
INDEX = "https://download.pytorch.org/whl"


@dataclass(frozen=True)
class Build:
    """A build of torch for Linux.

    `driver` is the oldest that runs it, `kernels` the compute capabilities it was compiled for.
    """

    cuda: str
    driver: str
    kernels: tuple[tuple[int, int], ...]

    @property
    def name(self) -> str:
        return f"cu{self.cuda.replace('.', '')}"

    def words(self) -> list[str]:
        """For `pip install`."""
        return [f"torch=={tested_torch()}+{self.name}", "--extra-index-url", f"{INDEX}/{self.name}"]

    def fault(self, driver: str, gpus: Iterable[Gpu]) -> str:
        """Why it does not run there; "" if it does."""
        if version_numbers(driver) < version_numbers(self.driver):
            return f"CUDA {self.cuda} needs driver {self.driver} or newer"
        without = dict.fromkeys(f"{gpu.name} ({dotted(gpu.capability)})" for gpu in gpus if not self._runs_on(gpu))
        return f"CUDA {self.cuda} has no kernels for {', '.join(without)}" if without else ""

    def _runs_on(self, gpu: Gpu) -> bool:
        return gpu.capability is None or has_kernels(self.kernels, gpu.capability)


# Best first: PyPI's, the older stable one, and the one with Blackwell for drivers below 580. 13.2, the fourth that is
# published, would run nowhere that 13.0 does not.
BUILDS = (
    Build("13.0", "580", ((7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0))),
    Build("12.6", "525.60.13", ((5, 0), (6, 0), (7, 0), (7, 5), (8, 0), (8, 6), (9, 0))),
    Build("12.9", "525.60.13", ((7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0))),
)
# `pip install torch` takes this one from PyPI or its mirror, without the index of PyTorch.
OF_PYPI = BUILDS[0]


def has_kernels(kernels: Iterable[tuple[int, ...]], capability: tuple[int, ...]) -> bool:
    """Whether code for one of these compute capabilities runs: of the same major version, up to the minor one."""
    return any(major == capability[0] and minor <= capability[1] for major, minor in kernels)


def choose_build(driver: str, gpus: Sequence[Gpu]) -> Build:
    """The best build that runs all GPUs; raises UserError where none does."""
    faults = []
    for build in BUILDS:
        fault = build.fault(driver, gpus)
        if not fault:
            return build
        faults.append(fault)
    machine = f"{describe(gpus)} with driver {driver or 'unknown'}"
    todo = "update the driver, or rent a machine with a newer one, or with newer GPUs of one kind"
    raise UserError(f"no build of torch runs on {machine}: {'; '.join(faults)}; {todo}")


def describe(gpus: Sequence[Gpu]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in Counter(gpu.name for gpu in gpus).items())


def dotted(capability: tuple[int, ...] | None) -> str:
    return ".".join(map(str, capability or ())) or "unknown"


def tested_torch() -> str:
    """The version that requirements.txt pins."""
    return re.search(r"^torch==(.+)$", REQUIREMENTS.read_text(encoding="utf-8"), re.MULTILINE)[1]


def main() -> None:
    gpus = list_gpus()
    if not gpus:
        return
    driver, _ = driver_versions()
    build = choose_build(driver, gpus)
    words = [f"torch=={tested_torch()}"] if build is OF_PYPI else build.words()
    sys.stdout.write(f"{build.cuda} {' '.join(words)}\n")
    sys.stdout.write(f"driver {driver}, {describe(gpus)}: torch built with CUDA {build.cuda}\n")


if __name__ == "__main__":
    run_script(main)
