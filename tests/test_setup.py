"""`setup.sh` with a stand-in for Python and pip: what it installs, and when it does not."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_nvidia_smi import Card, write_nvidia_smi

ROOT = Path(__file__).resolve().parents[1]
PIP = "-m pip install --no-input"
# Writes down its arguments; `-m venv` copies it into the new environment; the last pip call fails on request.
FAKE_PYTHON = """#!/usr/bin/env bash
echo "$*" >> "$LOG"
case "$*" in
    "-m venv --clear .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip install"*--requirement*) exit "${PIP_STATUS:-0}" ;;
    # As pip: what is installed is another build of the same version, and stays.
    "-m pip install"*torch==*) [ -s "$LOG.cuda" ] || echo "${PIP_FINDS:-13.0}" > "$LOG.cuda" ;;
    "-m pip uninstall"*) rm "$LOG.cuda" ;;
    "-c import torch"*) cat "$LOG.cuda" ;;
    "-c "*) exit "${OLD_PYTHON:-0}" ;;
    "-m medtune.torch_builds"*) exec "$REAL_PYTHON" "$@" ;;
    --version) echo "Python 3.9.1" ;;
esac
"""


class Project:
    """A folder with `setup.sh`, its requirements and the stand-in."""

    def __init__(self, folder: Path):
        self.folder = folder
        shutil.copy(ROOT / "setup.sh", folder)
        shutil.copytree(ROOT / "medtune", folder / "medtune", ignore=lambda *_: ["__pycache__"])
        self.write("requirements.txt", "# pinned\ntorch==1.0\ntransformers==2.0\n")
        self.write("requirements/dev.txt", "-r ../requirements.txt\npytest==3.0\n")
        self.write("requirements/gpu.txt", "deepspeed==4.0\n")
        self.python = folder / "fake-python"
        self.write(self.python.name, FAKE_PYTHON).chmod(0o755)
        self.stamp = folder / ".venv/requirements.sha256"

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    def setup(self, *flags: str, **variables: str) -> subprocess.CompletedProcess:
        log = self.write("log", "")
        environment = {"PATH": f"{self.folder}/bin:/usr/bin:/bin", "LOG": str(log), "PYTHON": str(self.python)}
        environment |= {"REAL_PYTHON": sys.executable} | variables
        command = ["bash", str(self.folder / "setup.sh"), *flags]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    def installs(self) -> list[str]:
        """The pip install lines of the last run, without what they have in common."""
        lines = (self.folder / "log").read_text().splitlines()
        return [line.removeprefix(PIP).strip() for line in lines if line.startswith(PIP)]


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def test_installs_torch_first_and_a_second_run_does_nothing(project):
    first = project.setup()
    assert (first.returncode, first.stderr) == (0, "")
    assert project.installs() == ["torch==1.0", "--requirement=requirements.txt"]
    again = project.setup()
    assert again.returncode == 0
    assert again.stdout == "setup: .venv already has requirements.txt: nothing to do\n"
    assert (project.folder / "log").read_text() == ""


def test_installs_only_the_file_that_is_missing(project):
    project.setup()
    project.setup("--dev")
    assert project.installs() == ["torch==1.0", "--requirement=requirements/dev.txt"]
    project.setup("--gpu")
    assert project.installs() == ["torch==1.0", "--requirement=requirements/gpu.txt"]
    project.setup("--dev", "--gpu")
    assert project.installs() == []


# ---------------------------------------------------------------- the build of torch for a driver and its GPUs

INDEX = "--extra-index-url https://download.pytorch.org/whl"


@pytest.mark.parametrize(
    ("driver", "cards", "build", "torch"),
    [
        ("535.54.03", ["A100"], "12.6", f"torch==1.0+cu126 {INDEX}/cu126"),
        ("570.124.06", ["RTX 5090"], "12.9", f"torch==1.0+cu129 {INDEX}/cu129"),
        ("580.65.06", ["RTX 5090"], "13.0", "torch==1.0"),
        ("580.65.06", ["V100", "A100"], "12.6", f"torch==1.0+cu126 {INDEX}/cu126"),
    ],
)
def test_gpu_installs_the_build_that_the_driver_runs(project, driver, cards, build, torch):
    write_nvidia_smi(project.folder / "bin", driver, [Card.of(card) for card in cards])
    first = project.setup("--gpu", PIP_FINDS=build)
    assert first.returncode == 0, first.stderr
    assert project.installs() == [torch, "--requirement=requirements.txt --requirement=requirements/gpu.txt"]
    said = f"setup: driver {driver}, {', '.join(f'1 x NVIDIA {card}' for card in cards)}: torch built with CUDA {build}"
    assert first.stdout.splitlines()[0] == said
    again = project.setup("--gpu")
    assert project.installs() == []
    assert again.stdout.splitlines() == [
        said,
        "setup: .venv already has requirements.txt requirements/gpu.txt: nothing to do",
    ]


def test_gpu_replaces_another_build(project):
    project.setup("--gpu", PIP_FINDS="None")  # on a machine without GPU
    write_nvidia_smi(project.folder / "bin", "580.65.06", [Card.of("A100")])
    assert project.setup("--gpu").returncode == 0
    lines = (project.folder / "log").read_text().splitlines()
    assert [line for line in lines if line.startswith("-m pip ")][1:] == [
        "-m pip uninstall --yes torch",
        f"{PIP} torch==1.0",
    ]
    project.setup("--dev")
    project.setup("--gpu", "--dev")
    assert project.installs() == []


def test_gpu_refuses_a_driver_that_runs_no_build_and_pip_s_choice_of_another(project):
    write_nvidia_smi(project.folder / "bin", "470.256.02", [Card.of("V100")])
    refused = project.setup("--gpu")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: no build of torch runs on 1 x NVIDIA V100 with driver 470.256.02: ")
    assert refused.stderr.count("\n") == 1
    assert project.installs() == []
    write_nvidia_smi(project.folder / "bin", "550.54.14", [Card.of("V100")])
    refused = project.setup("--gpu", PIP_FINDS="13.0")
    assert refused.returncode == 2
    assert "error: pip installed torch for CUDA 13.0, not 12.6: PIP_EXTRA_INDEX_URL" in refused.stderr
    assert not project.stamp.exists()


def test_gpu_without_a_gpu_takes_torch_as_pip_finds_it(project):
    assert project.setup("--gpu").stdout.startswith("setup: nvidia-smi lists no GPU here: torch as pip finds it\n")
    assert project.installs()[0] == "torch==1.0"


# ---------------------------------------------------------------- what changes, fails, or is missing


def test_changed_requirements_are_installed_again_and_so_are_the_old_ones(project):
    old = (project.folder / "requirements.txt").read_text()
    project.setup()
    for text in (old + "peft==5.0\n", old):
        project.write("requirements.txt", text)
        project.setup()
        assert project.installs() == ["torch==1.0", "--requirement=requirements.txt"]


def test_a_failed_install_leaves_no_stamp(project):
    project.setup()
    failed = project.setup("--dev", PIP_STATUS="3")
    assert failed.returncode == 3
    assert not project.stamp.exists()
    project.setup("--dev")
    assert project.installs() == [
        "torch==1.0",
        "--requirement=requirements.txt --requirement=requirements/dev.txt",
    ]


def test_a_removed_environment_is_made_again(project):
    project.setup()
    (project.folder / ".venv/bin/python").unlink()
    assert project.setup().returncode == 0
    assert (project.folder / "log").read_text().splitlines()[1] == "-m venv --clear .venv"


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_active_environment_is_used(project, tmp_path, variable):
    (tmp_path / "rented/bin").mkdir(parents=True)
    shutil.copy(project.python, tmp_path / "rented/bin/python")
    result = project.setup(**{variable: str(tmp_path / "rented"), "USE_ACTIVE_ENV": "1"})
    assert result.returncode == 0
    assert project.installs() == ["torch==1.0", "--requirement=requirements.txt"]
    assert (tmp_path / "rented/requirements.sha256").exists()
    assert not (project.folder / ".venv").exists()


@pytest.mark.parametrize(
    ("flags", "variables", "message"),
    [
        (["--active"], {}, "--active: no conda or virtual environment is active"),
        (["--cuda"], {}, "unknown flag --cuda"),
        ([], {"PYTHON": "python0"}, "python0 was not found: set PYTHON to a Python 3.11"),
        ([], {"OLD_PYTHON": "1"}, "is Python 3.9.1: Python 3.11 or newer is needed"),
    ],
)
def test_user_errors_are_one_line(project, flags, variables, message):
    result = project.setup(*flags, **variables)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not project.stamp.exists()


def test_real_requirements_pin_torch_once():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert len([line for line in lines if line.startswith("torch==")]) == 1
