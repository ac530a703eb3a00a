"""What nvidia-smi says of driver and GPUs; it is there where a driver is, with torch or without."""

import re
import subprocess
from dataclasses import dataclass

SECONDS_TO_ANSWER = 30  # of nvidia-smi, which first has to wake the GPUs
NO_ANSWER = f"no answer within {SECONDS_TO_ANSWER} s"


@dataclass(frozen=True)
class Gpu:
    """As nvidia-smi lists it, whatever CUDA_VISIBLE_DEVICES says.

    `capability` is the compute capability, such as (8, 6); None where the driver is too old to say it.
    """

    index: int
    name: str
    capability: tuple[int, ...] | None


def ask_nvidia_smi(*words: str) -> str:
    """What it answers, "" where it is not installed."""
    try:
        answer = subprocess.run(
            ["nvidia-smi", *words], capture_output=True, text=True, timeout=SECONDS_TO_ANSWER, check=False
        )
    except OSError:
        return ""
    except subprocess.TimeoutExpired:
        return NO_ANSWER
    return (answer.stdout + answer.stderr).strip() or f"exit code {answer.returncode}"


def query(kind: str, *fields: str) -> list[list[str]]:
    """The values of `--query-KIND`, a row for each GPU or process; none where the driver does not know a field."""
    answer = ask_nvidia_smi(f"--query-{kind}={','.join(fields)}", "--format=csv,noheader,nounits")
    rows = [[value.strip() for value in line.split(",")] for line in answer.splitlines()]
    return [row for row in rows if len(row) == len(fields)]


def gpu_names(listing: str) -> list[str]:
    """The GPUs in what `nvidia-smi -L` says."""
    return re.findall(r"^GPU \d+: *(.*?) *(?:\(UUID.*)?$", listing, re.MULTILINE)


def list_gpus() -> list[Gpu]:
    names = gpu_names(ask_nvidia_smi("-L"))
    capabilities = [version_numbers(row[1]) for row in query("gpu", "index", "compute_cap")] if names else []
    known = capabilities if len(capabilities) == len(names) and all(capabilities) else [None] * len(names)
    return [Gpu(index, *described) for index, described in enumerate(zip(names, known, strict=True))]


def driver_versions() -> tuple[str, str]:
    """Of the driver and of the newest CUDA that it has, such as ("535.54.03", "12.2"); "" for what it does not say."""
    table = ask_nvidia_smi()
    answer = f"{ask_nvidia_smi('--query-gpu=driver_version', '--format=csv,noheader')}\n"
    driver = re.match(r"(\d+\.[\d.]+)\s", answer) or re.search(r"Driver Version: *([\d.]+)", table)
    cuda = re.search(r"CUDA(?: UMD)? Version: *([\d.]+)", table)
    return driver[1] if driver else "", cuda[1] if cuda else ""


def version_numbers(version: str) -> tuple[int, ...]:
    """(535, 54, 3) of "535.54.03"."""
    return tuple(int(part) for part in re.findall(r"\d+", version))
