"""How a script ends: with one line for a mistake, at the second signal, with its launcher."""

import inspect
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from medtune import errors
from medtune.errors import UserError, end_at_next_signal, run_script

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("module", "logger"),
    [("bitsandbytes.backends.cpu.ops", "logger"), ("deepspeed.accelerator.real_accelerator", "accel_logger")],
)
def test_a_library_says_all_but_its_misleading_line(monkeypatch, caplog, module, logger):
    logger = getattr(import_module(module), logger)
    misleading = errors.MISLEADING[logger.name]
    assert misleading in inspect.getsource(sys.modules[module])
    monkeypatch.setattr(logger, "propagate", True)
    logger.warning(misleading)
    logger.warning("another line")
    assert set(caplog.messages) == {"another line"}  # once for each handler


def test_a_mistake_is_one_line_and_2(capsys):
    def main():
        raise UserError("--flag 1: give 2")

    with pytest.raises(SystemExit) as stopped:
        run_script(main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: --flag 1: give 2\n"


@pytest.mark.parametrize(
    ("rank", "line", "code", "said"),
    [
        ("0", "raise UserError('--flag 1: give 2')", 2, "error: --flag 1: give 2\n"),
        (
            "1",
            "errors.SECONDS_FOR_THE_FIRST = 0.1; raise UserError('--flag 1: give 2')",
            2,
            "error: --flag 1: give 2\n",
        ),
        ("1", "sys.exit(143)", 143, ""),
        ("1", "atexit.register(sys.stderr.write, 'last')", 0, "last"),
    ],
)
def test_one_of_several_processes_ends_without_the_interpreters_shutdown(rank, line, code, said):
    script = "import atexit, sys\nfrom medtune import errors\nfrom medtune.errors import UserError, run_script\n"
    script += f"def main():\n    {line}\n"
    script += "class Abort:\n    __del__ = lambda self: sys.stderr.write('shut down')\n"
    script += "kept = Abort()\nrun_script(main)\n"
    command, environment = [sys.executable, "-c", script], os.environ | {"LOCAL_RANK": rank}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stderr) == (code, said)


def test_memory_that_is_full_before_training_is_one_line(capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")

    with pytest.raises(SystemExit) as stopped:
        run_script(main)
    assert stopped.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: out of memory: CUDA out of memory. Tried to allocate 2.00 GiB.; the weights alone")
    assert line.count("\n") == 1


def test_a_second_signal_ends_the_process_and_an_echo_of_the_first_does_not(monkeypatch):
    previous, sent = signal.getsignal(signal.SIGTERM), []
    clock = iter([10.0, 10.1, 10.0 + 2 * errors.SECONDS_OF_ONE_SIGNAL])
    monkeypatch.setattr(errors.time, "monotonic", lambda: next(clock))
    try:
        end_at_next_signal(signal.SIGTERM)
        monkeypatch.setattr(errors.os, "kill", lambda pid, number: sent.append((pid, number)))
        for expected in ([], [(os.getpid(), signal.SIGTERM)]):
            signal.raise_signal(signal.SIGTERM)
            assert sent == expected
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_a_script_whose_launcher_is_gone_already_does_not_start():
    environment = os.environ | {"LAUNCHER_PID": "1" if os.getpid() != 1 else "2"}
    code = "from medtune.errors import run_script; run_script(lambda: print('started'))"
    finished = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert (finished.returncode, finished.stdout) == (-signal.SIGTERM, "")
