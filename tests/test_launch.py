"""What the launchers start several processes with: how it ends, and how nodes find each other."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_nvidia_smi import Card, write_nvidia_smi

from medtune import launch
from medtune.errors import UserError
from medtune.launch import rendezvous

ROOT = Path(__file__).resolve().parents[1]
WAITS = """
import os, pathlib, signal, sys, time
rank = os.environ["RANK"]
def save(number, frame):
    time.sleep(1)
    pathlib.Path(f"saved-{rank}").touch()
    sys.exit(128 + number)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, save)
pathlib.Path(f"ready-{rank}").touch()
time.sleep(600)
"""


FOLLOWS = "from medtune.errors import run_script\ndef main():" + WAITS.replace("\n", "\n    ") + "\nrun_script(main)\n"


def start(script: Path, **variables: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "medtune.launch"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "N_PROCESSES": "2"} | variables
    return subprocess.Popen(
        [*command, str(script)], cwd=script.parent, env=environment, stderr=subprocess.PIPE, text=True
    )


def wait_for(launcher: subprocess.Popen, folder: Path, what: str) -> None:
    deadline = time.monotonic() + 300
    while not all((folder / f"{what}-{rank}").exists() for rank in (0, 1)):
        assert launcher.poll() in (None, -signal.SIGKILL), launcher.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_all_processes_and_is_the_exit_code(tmp_path, number, code):
    script = tmp_path / "waits.py"
    script.write_text(WAITS)
    launcher = start(script)
    wait_for(launcher, tmp_path, "ready")
    launcher.send_signal(number)
    log = launcher.communicate(timeout=120)[1]
    assert launcher.returncode == code, log
    assert all((tmp_path / f"saved-{rank}").exists() for rank in (0, 1))
    assert "Traceback" not in log


@pytest.mark.parametrize("slow", ["0", "1"])
def test_a_mistake_that_all_processes_meet_is_said_once_whoever_is_first(tmp_path, slow):
    script = tmp_path / "fails.py"
    script.write_text(
        "import os, time\nfrom medtune.errors import UserError, run_script\ndef main():\n"
        f"    time.sleep(2 if os.environ['LOCAL_RANK'] == '{slow}' else 0)\n"
        "    raise UserError('--flag 1: give 2')\nrun_script(main)\n"
    )
    launcher = start(script)
    log = launcher.communicate(timeout=120)[1]
    assert launcher.returncode == 2, log
    assert log.count("error: --flag 1: give 2\n") == 1


def test_a_launcher_that_is_killed_leaves_no_process_that_writes_on(tmp_path):
    script = tmp_path / "follows.py"
    script.write_text(FOLLOWS)
    launcher = start(script)
    wait_for(launcher, tmp_path, "ready")
    launcher.kill()
    wait_for(launcher, tmp_path, "saved")
    launcher.communicate(timeout=60)  # until the last process has closed the log


def test_a_mistake_ends_with_the_code_of_the_process(tmp_path):
    script = tmp_path / "refuses.py"
    script.write_text("import sys; sys.exit(2)")
    launcher = start(script)
    log = launcher.communicate(timeout=300)[1]
    assert launcher.returncode == 2, log
    assert "Traceback" not in log


def test_one_node_finds_itself_and_several_find_the_first():
    assert rendezvous({}) == rendezvous({"NNODES": "1"}) == rendezvous({"NNODES": ""}) == ["--standalone"]
    variables = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}
    expected = "--nnodes 2 --node_rank 1 --master_addr 10.0.0.1 --master_port"
    assert rendezvous(variables) == [*expected.split(), "29500"]
    assert rendezvous(variables | {"MASTER_PORT": "4000"})[-1] == "4000"


@pytest.mark.parametrize("missing", ["NODE_RANK", "MASTER_ADDR"])
def test_a_missing_variable_is_named(missing):
    variables = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "10.0.0.1"}
    del variables[missing]
    with pytest.raises(UserError, match=f"NNODES=2 needs {missing}: "):
        rendezvous(variables)


# ---------------------------------------------------------------- how many processes


@pytest.fixture
def started(monkeypatch, tmp_path):
    """A function that gives the launcher's `main` a machine with so many GPUs and returns its number of processes.

    0 is python without torchrun.
    """
    calls = []
    monkeypatch.setattr(os, "execv", lambda path, words: calls.append(words) or sys.exit())
    monkeypatch.setattr(launch, "torchrun", calls.append)
    monkeypatch.setattr(launch, "cpu_reason", lambda use_cpu: "")

    def start(n_gpus: int, *flags: str, **variables: str) -> int:
        (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n" + "echo 'GPU 0: a card'\n" * n_gpus + "exit 0\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        for name, value in ({"PATH": str(tmp_path)} | variables).items():
            monkeypatch.setenv(name, value)
        words = ["stage.py", "--learning_rate", "1e-3", *flags]
        try:
            launch.main(words)
        except SystemExit:
            assert calls.pop() == [sys.executable, *words]
            return 0
        call = calls.pop()
        assert call[-len(words) :] == words
        return int(call[call.index("--nproc_per_node") + 1])

    return start


@pytest.mark.parametrize(
    ("n_gpus", "listed", "processes"),
    [(0, "0,1", 0), (1, "0,1", 0), (2, "0,1", 2), (8, "3", 0), (2, "", 0), (2, "-1", 0)],
)
def test_one_process_runs_for_each_gpu_that_is_listed_and_there(started, n_gpus, listed, processes):
    assert started(n_gpus, CUDA_VISIBLE_DEVICES=listed) == processes


@pytest.mark.parametrize(
    ("flags", "processes"),
    [
        ("--use_cpu True", 0),
        ("--use_cpu", 0),
        ("--use-cpu=true", 0),
        ("--no_cuda", 0),
        ("--use_cpu False", 2),
        ("--use_cpu True --use_cpu False", 2),
        ("--help", 0),
        ("--deepspeed ds_configs/zero2.json", 2),
        ("--deepspeed ds_configs/zero2.json --use_cpu True", 1),
    ],
)
def test_flags_that_decide_on_processes(started, flags, processes):
    assert started(2, *flags.split(), CUDA_VISIBLE_DEVICES="0,1") == processes


@pytest.mark.parametrize(
    ("variables", "processes"),
    [
        ({"N_PROCESSES": "2"}, 2),
        ({"N_PROCESSES": "1"}, 0),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a"}, 1),
        ({"N_PROCESSES": "2", "VLLM_GPUS": "1"}, 2),  # which is for PPO and GRPO
    ],
)
def test_variables_that_decide_on_processes(started, variables, processes):
    assert started(0, CUDA_VISIBLE_DEVICES="0,1", **variables) == processes


@pytest.mark.parametrize(
    ("driver", "cards", "given", "setting"),
    [
        ("535.54.03", ["RTX 4090", "RTX 4090"], None, "1"),
        ("535.54.03", ["RTX 4090", "RTX 4090"], "0", "0"),
        ("550.54.14", ["RTX 4090", "RTX 4090"], None, None),
        ("535.54.03", ["A100", "A100"], None, None),
    ],
)
def test_gpus_that_hang_when_they_reach_for_each_other_do_not(
    started, monkeypatch, tmp_path, driver, cards, given, setting
):
    def start(words):
        settings.update(os.environ)

    settings: dict[str, str] = {}
    monkeypatch.setattr(launch, "torchrun", start)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    write_nvidia_smi(tmp_path, driver, [Card.of(card) for card in cards])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if given:
        monkeypatch.setenv("NCCL_P2P_DISABLE", given)
    launch.main(["stage.py"])
    assert settings.get("NCCL_P2P_DISABLE") == setting


def test_a_number_of_processes_that_is_none(started):
    with pytest.raises(UserError, match="N_PROCESSES=two: give a number"):
        started(0, N_PROCESSES="two")


def test_python_takes_the_launcher_s_place(tmp_path):
    script = tmp_path / "stage.py"
    script.write_text("import os, sys; print(os.getpid(), *sys.argv[1:])")
    command = [sys.executable, "-m", "medtune.launch", str(script), "--flag", "a b"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "N_PROCESSES": "1"}
    launcher = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert launcher.communicate(timeout=60)[0] == f"{launcher.pid} --flag a b\n"
