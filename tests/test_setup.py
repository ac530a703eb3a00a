"""`setup.sh` with a stand-in for Python and pip: what it installs, and when it does not."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PIP = "-m pip install --no-input"
# Writes down its arguments; `-m venv` copies it into the new environment; the last pip call fails on request.
FAKE_PYTHON = """#!/usr/bin/env bash
echo "$*" >> "$LOG"
case "$*" in
    "-m venv --clear .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip install"*--requirement*) exit "${PIP_STATUS:-0}" ;;
    "-c "*) exit "${OLD_PYTHON:-0}" ;;
    --version) echo "Python 3.9.1" ;;
esac
"""


class Project:
    """A folder with `setup.sh`, its requirements and the stand-in."""

    def __init__(self, folder: Path):
        self.folder = folder
        shutil.copy(ROOT / "setup.sh", folder)
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
        environment = {"PATH": "/usr/bin:/bin", "LOG": str(log), "PYTHON": str(self.python)} | variables
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
