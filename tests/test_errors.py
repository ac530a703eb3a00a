"""How a script ends: with one line for a mistake, at the second signal, with its launcher."""

import os
import signal
import subprocess
import sys

import pytest

import errors
from errors import UserError, end_at_next_signal, run_script


def test_a_mistake_is_one_line_and_2(capsys, monkeypatch):
    def main():
        raise UserError("--flag 1: give 2")

    for rank, said in (("0", "error: --flag 1: give 2\n"), ("1", "")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as stopped:
            run_script(main)
        assert stopped.value.code == 2
        assert capsys.readouterr().err == said


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
    code = "from errors import run_script; run_script(lambda: print('started'))"
    finished = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert (finished.returncode, finished.stdout) == (-signal.SIGTERM, "")
