"""Which build of torch fits: for the drivers and cards that are rented, and as torch itself says."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch.cuda
from fake_nvidia_smi import CAPABILITIES, Card, write_nvidia_smi

from medtune import nvidia_smi, torch_builds
from medtune.errors import UserError
from medtune.nvidia_smi import Gpu, driver_versions, list_gpus, version_numbers
from medtune.torch_builds import BUILDS, choose_build, has_kernels

ROOT = Path(__file__).resolve().parents[1]
DRIVERS = ["525.60.13", "535.54.03", "550.54.14", "560.35.03", "570.86.10", "575.51.03", "580.65.06", "590.44.01"]


def gpus(*names: str) -> list[Gpu]:
    return [Gpu(index, f"NVIDIA {name}", version_numbers(CAPABILITIES[name])) for index, name in enumerate(names)]


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(
    ("card", "before_580", "from_580"),
    [
        ("P100", "12.6", "12.6"),
        ("V100", "12.6", "12.6"),
        ("T4", "12.6", "13.0"),
        ("A100", "12.6", "13.0"),
        ("RTX 3090", "12.6", "13.0"),
        ("RTX 4090", "12.6", "13.0"),
        ("H100", "12.6", "13.0"),
        ("B200", "12.9", "13.0"),
        ("RTX 5090", "12.9", "13.0"),
    ],
)
def test_drivers_and_cards(driver, card, before_580, from_580):
    assert choose_build(driver, gpus(card, card)).cuda == (from_580 if driver >= "580" else before_580)


@pytest.mark.parametrize(
    ("driver", "cards", "fault"),
    [
        ("470.256.02", ["A100"], "CUDA 12.6 needs driver 525.60.13 or newer"),
        ("525.53", ["A100"], "CUDA 12.6 needs driver 525.60.13 or newer"),
        ("580.65.06", ["K80"], "CUDA 12.6 has no kernels for NVIDIA K80 (3.7)"),
        ("580.65.06", ["V100", "RTX 5090"], "CUDA 12.6 has no kernels for NVIDIA RTX 5090 (12.0)"),
        ("", ["A100"], "CUDA 12.6 needs driver 525.60.13 or newer"),
    ],
)
def test_where_no_build_fits(driver, cards, fault):
    with pytest.raises(UserError, match="no build of torch runs on") as refusal:
        choose_build(driver, gpus(*cards))
    assert fault in str(refusal.value)
    assert f"driver {driver or 'unknown'}: " in str(refusal.value)


def test_the_table_is_torch_s_own():
    for build in BUILDS:
        kernels = {10 * major + minor for major, minor in build.kernels}
        assert kernels == torch.cuda.PYTORCH_RELEASES_CODE_CC[build.cuda]["x86_64"]


@pytest.mark.parametrize(
    "capability", [(5, 2), (6, 1), (7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 3), (12, 1)]
)
def test_kernels_run_where_torch_says(capability):
    for build in BUILDS:
        device = 10 * capability[0] + capability[1]
        by_torch = any(device in torch.cuda.DEVICE_REQUIREMENT[10 * major + minor] for major, minor in build.kernels)
        assert has_kernels(build.kernels, capability) == by_torch


# ---------------------------------------------------------------- what nvidia-smi says


@pytest.fixture
def on_path(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_gpus_and_versions(on_path):
    write_nvidia_smi(on_path, "535.54.03", [Card.of("RTX 4090"), Card.of("V100")])
    assert list_gpus() == [Gpu(0, "NVIDIA RTX 4090", (8, 9)), Gpu(1, "NVIDIA V100", (7, 0))]
    assert driver_versions() == ("535.54.03", "12.2")


def test_a_driver_that_does_not_know_compute_capabilities(on_path):
    write_nvidia_smi(on_path, "470.256.02", [Card("NVIDIA A100", compute_cap="")])
    assert list_gpus() == [Gpu(0, "NVIDIA A100", None)]


def test_no_nvidia_smi(on_path, capsys):
    assert list_gpus() == []
    assert driver_versions() == ("", "")
    torch_builds.main()
    assert capsys.readouterr().out == ""


def test_what_setup_is_told(on_path, capsys):
    write_nvidia_smi(on_path, "550.54.14", [Card.of("A100"), Card.of("A100")])
    torch_builds.main()
    words, reason = capsys.readouterr().out.splitlines()
    assert words == "12.6 torch==2.13.0+cu126 --extra-index-url https://download.pytorch.org/whl/cu126"
    assert reason == "driver 550.54.14, 2 x NVIDIA A100: torch built with CUDA 12.6"


def test_it_needs_nothing_but_python():
    code = "import sys, medtune.torch_builds; sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, check=False).returncode == 0


def test_no_answer_in_time(monkeypatch, on_path):
    monkeypatch.setattr(nvidia_smi, "SECONDS_TO_ANSWER", 0.2)
    (on_path / "nvidia-smi").write_text("#!/bin/sh\nexec /bin/sleep 30\n")
    (on_path / "nvidia-smi").chmod(0o755)
    assert list_gpus() == []


@pytest.mark.parametrize("name", ["docs/trouble.md", "docs/trouble_ZH.md"])
def test_the_table_of_the_docs(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    header = next(line for line in lines if "V100" in line and "B200" in line)
    rows = [line.split("|")[2:5] for line in lines[lines.index(header) + 2 :][:2]]
    for driver, row in zip(("580.65.06", "579.99"), rows, strict=True):
        for cell, card in zip(row, ("V100", "A100", "B200"), strict=True):
            assert cell.strip() == f"CUDA {choose_build(driver, gpus(card)).cuda}"
    assert BUILDS[1].driver in "".join(lines)
