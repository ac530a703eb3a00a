"""What check_machine.sh finds: each thing as it is on good machines and on bad ones."""

import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

import check_machine
import pytest
import torch
from fake_nvidia_smi import Card, write_nvidia_smi
from test_launchers import launch
from test_readme import parse

from medtune import nvidia_smi
from medtune.errors import UserError
from medtune.machine import between_gpus, computing, driver, short_runs, storage
from medtune.machine.between_gpus import SETTINGS, all_reduce, check_all_reduce, run_limited
from medtune.machine.computing import check_computing
from medtune.machine.driver import check_gpus, check_torch
from medtune.machine.findings import FINE, GIB, NOTE, WRONG, Finding
from medtune.machine.short_runs import check_training
from medtune.machine.storage import available_memory, check_memory, check_output_disk, check_shared_memory

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function that puts a stand-in for nvidia-smi on the PATH."""

    def make(version: str, *cards: Card, processes: tuple[dict, ...] = ()) -> None:
        write_nvidia_smi(tmp_path / "bin", version, cards, processes=processes)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return make


def grades(findings: list[Finding]) -> list[str]:
    return [finding.grade for finding in findings]


# ---------------------------------------------------------------- torch, driver, GPUs


def test_gpus_that_torch_uses(machine, monkeypatch):
    machine("550.54.14", Card.of("A100"))
    monkeypatch.setattr(driver, "cpu_reason", lambda use_cpu: "")
    [finding] = check_torch()
    assert finding == Finding(
        FINE, "torch", f"{torch.__version__} runs on driver 550.54.14 (CUDA 12.2) and 1 x NVIDIA A100"
    )


def test_gpus_that_torch_cannot_use(machine):
    machine("550.54.14", Card.of("A100"))
    [finding] = check_torch()
    assert finding.grade == WRONG
    assert "(built without CUDA) can use none: install the build with CUDA 12.6: " in finding.text


@pytest.mark.parametrize(
    ("version", "cards", "grade", "text"),
    [
        ("570.86.10", ["RTX 5090"], NOTE, "bash setup.sh --gpu installs the build with CUDA 12.9"),
        ("470.256.02", ["A100"], WRONG, "no build of torch runs on 1 x NVIDIA A100 with driver 470.256.02"),
        ("550.54.14", [], NOTE, "not installed: bash setup.sh; nvidia-smi lists no GPU"),
    ],
)
def test_before_torch_is_installed(machine, monkeypatch, version, cards, grade, text):
    machine(version, *map(Card.of, cards))
    monkeypatch.setattr(driver.importlib.util, "find_spec", lambda name: None)
    [finding] = check_torch()
    assert (finding.grade, finding.subject) == (grade, "torch")
    assert text in finding.text


def test_no_gpu_and_hidden_ones(machine, monkeypatch):
    machine("550.54.14")
    without = list(check_torch())
    assert grades(without) == [NOTE, NOTE]
    assert "no CUDA device (nvidia-smi: No devices were found): runs go on the CPU" in without[0].text
    machine("550.54.14", Card.of("A100"), Card.of("A100"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES hides 2 x NVIDIA A100: runs go on the CPU" in next(check_torch()).text


def test_another_torch_than_the_tested_one(monkeypatch):
    monkeypatch.setattr(driver.importlib.metadata, "version", lambda name: "2.5.1+cu124")
    assert next(check_torch()).text.startswith("2.5.1+cu124 is not the tested version: bash setup.sh --gpu puts 2.")


def test_a_driver_that_hangs(monkeypatch, tmp_path):
    """Nothing that would hang too is asked, and the other things are still checked."""
    monkeypatch.setattr(driver, "ask_nvidia_smi", lambda *words: nvidia_smi.NO_ANSWER)
    for name in ("check_torch", "check_gpus", "usable_gpus", "check_training"):
        monkeypatch.setattr(check_machine, name, lambda *rest, name=name: pytest.fail(name))
    monkeypatch.setattr(check_machine, "check_hub", lambda: iter([]))
    hanging, *others = check_machine.check(tmp_path, train=True)
    todo = "restart the machine, or rent another; GPUs and torch are not checked"
    assert hanging == Finding(WRONG, "driver", f"nvidia-smi hangs (no answer within 30 s): {todo}")
    assert [finding.subject for finding in others] == ["disk", "shared memory", "memory"]


def test_nvidia_smi_is_given_up_after_a_time(monkeypatch, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(nvidia_smi, "SECONDS_TO_ANSWER", 0.1)
    assert driver.check_driver().grade == WRONG
    (tmp_path / "nvidia-smi").unlink()
    assert driver.check_driver() is None


def test_memory_of_gpus_and_who_else_is_there(machine):
    apps = ({"gpu_uuid": "GPU-1a", "pid": 7, "process_name": "python"},)
    used = Card.of("RTX 4090", memory_used=9000)
    machine("550.54.14", Card.of("RTX 4090"), used, used, Card("NVIDIA GB10", "12.1", "[N/A]", "[N/A]"), processes=apps)
    alone, shared, unseen, unknown = check_gpus()
    assert alone == Finding(FINE, "GPU 0", "NVIDIA RTX 4090, 24.0 GiB, 24.0 of them free")
    assert shared.text.startswith("NVIDIA RTX 4090, 24.0 GiB, 15.2 of them free; used by python (pid 7): end them")
    assert unseen.text.startswith("NVIDIA RTX 4090, 24.0 GiB, 15.2 of them free; used by processes that this container")
    assert (shared.grade, unseen.grade, unknown.grade) == (NOTE, NOTE, NOTE)


# ---------------------------------------------------------------- what devices compute


def test_a_device_that_computes_right():
    findings = list(check_computing(["cpu"]))
    assert {finding.subject: finding.grade for finding in findings} == dict.fromkeys(
        ("FlashAttention", "bfloat16", "bitsandbytes"), FINE
    )
    assert findings[-1].text == "right on cpu"


def test_a_device_that_computes_nonsense_or_fails(monkeypatch):
    def fail(device):
        raise RuntimeError("CUDA error: no kernel image is available\nfor execution")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(computing, "bfloat16_error", lambda device: 1.4)
    monkeypatch.setattr(computing, "four_bit_error", fail)
    _, nonsense, failed = check_computing(["cuda:0"])
    assert (nonsense.grade, nonsense.subject, failed.grade) == (WRONG, "bfloat16", WRONG)
    assert nonsense.text.startswith("cuda:0 computes nonsense (relative error 1.4): leave cuda:0 out of CUDA_VISIBLE")
    assert "fails (CUDA error: no kernel image is available for execution): leave" in failed.text


def test_a_gpu_without_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(computing, "four_bit_error", lambda device: 0.09)
    _, bfloat16, four_bit = check_computing(["cuda:0"])
    assert bfloat16.grade == NOTE
    assert "has none (compute capability 7.0): --fp16 True --bf16 False" in bfloat16.text
    assert four_bit.grade == FINE


@pytest.mark.parametrize(("value", "error"), [(1.0, 0.0), (0.5, 0.5), (float("nan"), float("inf"))])
def test_relative_error(value, error):
    assert computing._relative_error(torch.full((3, 3), value), torch.ones(3, 3)) == pytest.approx(error)


# ---------------------------------------------------------------- between GPUs


def test_an_all_reduce_of_two_processes(monkeypatch, tmp_path):
    monkeypatch.setattr(between_gpus, "SECONDS_TO_REDUCE", 300)
    measured = all_reduce(2, tmp_path / "log")
    assert isinstance(measured, dict), measured
    assert measured["bytes_a_second"] > 0


FAST, SLOW = {"bytes_a_second": 1e10, "peer_access": True}, {"bytes_a_second": 2e8, "peer_access": False}
HUNG = "no answer within 40 s"


@pytest.mark.parametrize(
    ("measured", "without_peers", "grade", "text"),
    [
        (FAST, None, FINE, "2 GPUs sum right, 10.0 GB/s, with peer access"),
        (SLOW, None, NOTE, "2 GPUs sum right, 0.2 GB/s, without peer access: enough for an adapter; all gradients"),
        (HUNG, FAST, WRONG, f"the GPUs do not reach each other by peer access ({HUNG}): export {SETTINGS}, with which"),
        (HUNG, "bad", WRONG, f"the GPUs do not reach each other ({HUNG}): CUDA_VISIBLE_DEVICES=0 trains on one; "),
    ],
)
def test_what_becomes_of_an_all_reduce(monkeypatch, tmp_path, measured, without_peers, grade, text):
    def stand_in(n_gpus, log, **variables):
        return without_peers if variables else measured

    monkeypatch.setattr(between_gpus, "all_reduce", stand_in)
    [found] = check_all_reduce(2, tmp_path / "log")
    assert (found.grade, found.text[: len(text)]) == (grade, text)


def test_old_drivers_of_cards_without_peer_access(machine, monkeypatch, tmp_path):
    machine("535.54.03", Card.of("RTX 4090"), Card.of("RTX 4090"))
    monkeypatch.setattr(between_gpus, "all_reduce", lambda n_gpus, log, **variables: FAST)
    note, fine = check_all_reduce(2, tmp_path / "log")
    assert f"need {SETTINGS}: the launchers set it" in note.text
    assert fine.grade == FINE


def test_what_hangs_is_ended_and_what_fails_says_why(monkeypatch, tmp_path):
    def run_code(command, *rest):
        return run_limited([sys.executable, "-c", code], *rest)

    log = tmp_path / "log"
    assert run_limited(["bash", "-c", "sleep 60 & sleep 60"], 0.3, {}, log) is None
    code = "print('RuntimeError: NCCL  failed'); print('bye'); raise SystemExit(3)"
    monkeypatch.setattr(between_gpus, "run_limited", run_code)
    assert all_reduce(2, log) == "RuntimeError: NCCL failed"


# ---------------------------------------------------------------- disk and memory

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("free", "rate", "grade", "text"),
    [
        (75e9, 500e6, FINE, "75 GB free in "),
        (75e9, 10e6, NOTE, "10 MB/s: 620 s for all weights of Qwen2.5-3B"),
        (20e9, 500e6, NOTE, "Qwen2.5-3B is 6 GB as it comes and again merged"),
        (5e9, 500e6, WRONG, "rent more, or name a folder on another disk with --output_dir"),
    ],
)
def test_disk(monkeypatch, tmp_path, free, rate, grade, text):
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda folder: Usage(1e12, 0, free))
    monkeypatch.setattr(storage, "write_rate", lambda folder: rate)
    [finding] = check_output_disk(tmp_path)
    assert finding.grade == grade
    assert text in finding.text


def test_the_write_rate_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "SECONDS_OF_WRITING", 0)
    assert storage.write_rate(tmp_path) >= 0
    monkeypatch.setattr(storage, "SECONDS_OF_WRITING", 0.1)
    assert storage.write_rate(tmp_path) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_no_files(monkeypatch, tmp_path):
    def full(dir):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    [finding] = check_output_disk(tmp_path)
    assert finding == Finding(
        WRONG, "disk", f"{tmp_path}: No space left on device; name a folder that takes files with --output_dir"
    )


@pytest.mark.parametrize(
    ("size", "n_gpus", "grade"), [(64 * 2**20, 2, WRONG), (64 * 2**20, 1, NOTE), (8 * GIB, 2, FINE)]
)
def test_shared_memory(monkeypatch, tmp_path, size, n_gpus, grade):
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda folder: Usage(size, 0, size))
    [finding] = check_shared_memory(n_gpus, tmp_path)
    assert finding.grade == grade
    assert ("--shm-size 8g" in finding.text) == (grade != FINE)
    [absent] = check_shared_memory(n_gpus, tmp_path / "none")
    assert absent.grade != FINE


@pytest.mark.parametrize(
    ("groups", "available"),
    [
        ({}, 20),
        ({"memory.max": "max", "memory.current": 2 * GIB}, 20),
        ({"memory.max": 8 * GIB, "memory.current": 2 * GIB}, 6),
        ({"memory/memory.limit_in_bytes": 9 * GIB, "memory/memory.usage_in_bytes": GIB}, 8),
        ({"memory/memory.limit_in_bytes": 2**63 - 4096, "memory/memory.usage_in_bytes": GIB}, 20),
    ],
)
def test_memory_of_a_machine_and_of_a_container(tmp_path, groups, available):
    files = {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {20 * 2**20} kB\n"}
    files |= {f"sys/fs/cgroup/{name}": value for name, value in groups.items()}
    for name, value in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{value}\n")
    assert available_memory(tmp_path) == available * GIB
    [finding] = check_memory(1, tmp_path)
    assert finding.grade == (NOTE if available < 7 else FINE)
    [for_four] = check_memory(4, tmp_path)
    assert for_four.grade == NOTE


# ---------------------------------------------------------------- training and the script


def test_a_stage_that_fails_leaves_its_log(monkeypatch, tmp_path):
    commands = {"one": (["true"], {}), "two": (["bash", "-c", "echo $A; echo 'error: no'; exit 2"], {"A": "b"})}
    monkeypatch.setattr(short_runs, "_commands", lambda folder: commands | {"three": (["true"], {})})
    fine, failed = check_training(tmp_path)
    assert (fine.grade, fine.subject) == (FINE, "one")
    [log] = tmp_path.glob("outputs-check-*/two.log")
    assert failed == Finding(WRONG, "two", f"exit code 2; error: no; all that it said: {log}")
    assert log.read_text() == "b\nerror: no\n"


def test_stages_that_succeed_leave_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(short_runs, "_commands", lambda folder: {"one": (["true"], {}), "two": (["true"], {})})
    assert grades(list(check_training(tmp_path))) == [FINE, FINE]
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing(monkeypatch, tmp_path):
    def interrupt(*rest):
        raise KeyboardInterrupt

    monkeypatch.setattr(short_runs, "_commands", lambda folder: {"one": (["true"], {}), "two": (["true"], {})})
    findings = check_training(tmp_path)
    assert next(findings).grade == FINE
    monkeypatch.setattr(short_runs, "run_limited", interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(findings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_three_steps_of_each_stage(tmp_path):
    findings = list(check_training(tmp_path))
    assert grades(findings) == [FINE] * 5, [finding.text for finding in findings]


@pytest.mark.parametrize(("grade", "code"), [(FINE, 0), (NOTE, 0), (WRONG, 1)])
def test_the_exit_code_says_whether_something_is_wrong(monkeypatch, capsys, tmp_path, grade, code):
    monkeypatch.setattr(check_machine, "check", lambda output_dir, train: iter([Finding(grade, "disk", "text")]))
    with pytest.raises(SystemExit) as stopped:
        check_machine.main(["--output_dir", str(tmp_path)])
    assert stopped.value.code == code
    line, summary = capsys.readouterr().out.splitlines()
    assert line.split() == [grade, "disk", "text"]
    assert summary.split(", ")[("wrong", "note", "fine").index(grade)].startswith("1 ")


def test_an_output_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"--output_dir .*nowhere: no such folder"):
        check_machine.main(["--output_dir", str(tmp_path / "nowhere")])


def test_the_output_folder_is_the_caller_s(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "python").write_text('#!/bin/sh\necho "$PWD" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    command = ["bash", str(ROOT / "check_machine.sh"), "--output_dir", "mine"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(tmp_path / "python")}
    called = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert called.stdout.split() == [str(tmp_path), str(ROOT / "scripts/check_machine.py"), "--output_dir", "mine"]


def test_it_starts_without_any_package(machine, tmp_path, monkeypatch):
    machine("550.54.14", Card.of("A100"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    (tmp_path / "bin/python").chmod(0o755)
    monkeypatch.setenv("PYTHON", str(tmp_path / "bin/python"))
    command = ["bash", str(ROOT / "check_machine.sh"), "--output_dir", str(tmp_path)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.stderr == ""
    lines = checked.stdout.splitlines()
    assert "not installed; driver 550.54.14 (CUDA 12.2), 1 x NVIDIA A100: bash setup.sh --gpu installs" in lines[0]
    assert lines[1].startswith("fine   GPU 0")
    assert lines[-1].startswith("0 wrong, ")


def test_all_reduce_sums_are_compared(monkeypatch):
    from medtune.machine.all_reduce import measure

    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: tensor.add_(2))
    assert measure(4096, torch.device("cpu")) > 0
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: tensor[1:].add_(2))
    with pytest.raises(AssertionError, match=r"sums from 1.0 to 3.0 where all are 3.0"):
        measure(4096, torch.device("cpu"))


def test_tests_for_gpus_want_one(tmp_path):
    (tmp_path / "dirname").symlink_to("/usr/bin/dirname")
    command = ["/bin/bash", str(ROOT / "run_tests.sh"), "--gpu"]
    refused = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "error: --gpu: there is no nvidia-smi, so no GPU; leave the flag out\n"
    broken = tmp_path / "nvidia-smi"
    broken.write_text("#!/bin/bash\necho no driver\nexit 9\n")
    broken.chmod(0o755)
    refused = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "error: --gpu: nvidia-smi lists no GPU (no driver); bash check_machine.sh says more\n"


def test_short_runs_have_flags_that_the_stages_take(machine, monkeypatch, tmp_path):
    machine("550.54.14", Card.of("A100"), Card.of("A100"))
    commands = short_runs._commands(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # to parse on the CPU
    assert [name.partition(",")[0] for name in commands] == ["tiny model", "sft", "dpo", "rm", "ppo"]
    for (_, launcher, *flags), variables in list(commands.values())[1:]:
        assert (variables["CUDA_VISIBLE_DEVICES"], variables["EPISODES"]) == ("0,1", "24")
        assert variables["ESTIMATE"] == variables["DEEPSPEED"] == ""  # whatever stands in the environment
        own = {name: value for name, value in variables.items() if name != "PYTHON"}
        call = launch(launcher, tmp_path, *flags, **own)
        parse(call.script, call.flags)
