"""GPUs that torch cannot use stop what would take days on the CPU, in one line, unless the CPU was chosen."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from fake_nvidia_smi import Card, write_nvidia_smi

from medtune import devices
from medtune.devices import cpu_reason
from medtune.errors import UserError
from medtune.nvidia_smi import NO_ANSWER, version_numbers

ROOT = Path(__file__).resolve().parents[1]
LISTS_TWO = "echo 'GPU 0: Fake (UUID: GPU-1a)'\necho 'GPU 1: Fake (UUID: GPU-2b)'"
# As the tool itself: a list with -L, otherwise a table.
WHOLE = f"""if [ "$1" = -L ]; then {LISTS_TWO}; else
    echo '| NVIDIA-SMI 535.54.03    Driver Version: 535.54.03    CUDA Version: 12.2 |'
fi"""
NO_DRIVER = """echo "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
echo 'Make sure that the latest NVIDIA driver is installed and running.'
exit 9"""


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function that puts a stand-in for nvidia-smi first on the PATH, and says which GPUs may be used."""

    def make(nvidia_smi: str | None, visible: str | None = None) -> None:
        if nvidia_smi is not None:
            (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{nvidia_smi}\n", encoding="utf-8")
            (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin" if nvidia_smi else str(tmp_path))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return make


# ---------------------------------------------------------------- the decision


@pytest.mark.parametrize(
    ("nvidia_smi", "visible", "use_cpu", "reason"),
    [
        (LISTS_TWO, None, True, "--use_cpu"),
        (LISTS_TWO, "0,1", True, "--use_cpu"),
        (LISTS_TWO, "", False, "no CUDA device"),
        (LISTS_TWO, "-1", False, "no CUDA device"),
        (LISTS_TWO, "-1,0", False, "no CUDA device"),
        (None, "0,1", False, "no CUDA device"),
        ("echo 'No devices were found'\nexit 6", None, False, "no CUDA device (nvidia-smi: No devices were found)"),
        ("exit 127", None, False, "no CUDA device (nvidia-smi: exit code 127)"),
        ("sleep 60", None, False, f"no CUDA device (nvidia-smi: {NO_ANSWER})"),
        (
            NO_DRIVER,
            "0,1",
            False,
            "no CUDA device (nvidia-smi: NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. "
            "Make sure that the latest NVIDIA driver is installed and running.)",
        ),
    ],
)
def test_on_the_cpu_by_choice_or_because_there_is_no_gpu(machine, monkeypatch, nvidia_smi, visible, use_cpu, reason):
    monkeypatch.setattr("medtune.nvidia_smi.SECONDS_TO_ANSWER", 1)
    machine(nvidia_smi, visible)
    assert cpu_reason(use_cpu) == reason


@pytest.mark.parametrize("visible", [None, "0,1", "1"])
@pytest.mark.parametrize(
    ("nvidia_smi", "found"),
    [(LISTS_TWO, "2 x Fake; driver unknown"), (WHOLE, "2 x Fake; driver 535.54.03, which has CUDA 12.2")],
)
def test_a_build_without_cuda(machine, nvidia_smi, found, visible):
    machine(nvidia_smi, visible)
    with pytest.raises(UserError) as refusal:
        cpu_reason(False)
    torch_found = f"torch {torch.__version__} (built without CUDA) can use none: install "
    assert str(refusal.value).startswith(f"nvidia-smi lists GPUs ({found}), {torch_found}")
    assert str(refusal.value).endswith("; --use_cpu True goes on without")
    assert "\n" not in str(refusal.value)


TOO_OLD = "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver."
INSTALL = (
    f"install the build with CUDA {{}}: {sys.executable} -m pip install torch=={torch.__version__.partition('+')[0]}"
)


@pytest.mark.parametrize(
    ("visible", "why"),
    [
        (None, f"The NVIDIA driver on your system is too old (found version 12020); {INSTALL.format('12.6')}+cu126 "),
        ("1", f"The NVIDIA driver on your system is too old (found version 12020); {INSTALL.format('12.6')}+cu126 "),
        ("GPU-2b", "The NVIDIA driver on your system is too old"),
        ("7", "CUDA_VISIBLE_DEVICES=7: 7 is none of them"),
        ("2,0", "CUDA_VISIBLE_DEVICES=2,0: 2 is none of them"),
        ("GPU-9", "CUDA_VISIBLE_DEVICES=GPU-9: GPU-9 is none of them"),
    ],
)
def test_a_build_with_cuda(machine, monkeypatch, visible, why):
    def refuse():
        raise RuntimeError(TOO_OLD)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", refuse)
    machine(WHOLE, visible)
    with pytest.raises(UserError) as refusal:
        cpu_reason(False)
    assert f"(built with CUDA 13.0) can use none: {why}" in str(refusal.value)


@pytest.mark.parametrize(
    ("driver", "card", "built", "todo"),
    [
        ("550.54.14", "RTX 4090", None, f"{INSTALL.format('12.6')}+cu126 --extra-index-url "),
        ("580.65.06", "RTX 4090", None, f"{INSTALL.format('13.0')}+cu130 --extra-index-url "),
        ("570.86.10", "RTX 5090", "13.0", f"{INSTALL.format('12.9')}+cu129 --extra-index-url "),
        ("470.256.02", "T4", "13.0", "no build of torch runs on 1 x NVIDIA T4 with driver 470.256.02: CUDA 13.0 needs"),
        ("550.54.14", "A100", "12.6", "this is the right build for the driver: restart the machine"),
    ],
)
def test_the_build_for_this_driver_is_named(machine, monkeypatch, tmp_path, driver, card, built, todo):
    machine("")
    write_nvidia_smi(tmp_path, driver, [Card.of(card)])
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    with pytest.raises(UserError) as refusal:
        cpu_reason(False)
    message = str(refusal.value)
    assert f"nvidia-smi lists GPUs (1 x NVIDIA {card}; driver {driver}, which has CUDA 12.2)" in message
    assert todo in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("driver", "card", "arches", "todo"),
    [
        ("580.65.06", "V100", "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120", f"{INSTALL.format('12.6')}+cu126 "),
        ("570.86.10", "RTX 5090", "sm_50 sm_60 sm_70 sm_75 sm_80 sm_86 sm_90", f"{INSTALL.format('12.9')}+cu129 "),
        ("580.65.06", "RTX 4090", "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120", None),
        ("550.54.14", "H100", "sm_80 sm_90a", None),
        ("580.65.06", "B200", "sm_80 compute_90", None),
        ("580.65.06", "V100", "", None),  # a build that does not say
    ],
)
def test_a_build_without_kernels_for_a_gpu(machine, monkeypatch, tmp_path, driver, card, arches, todo):
    machine("")
    card = Card.of(card)
    write_nvidia_smi(tmp_path, driver, [card])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: arches.split())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: version_numbers(card.compute_cap))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: card.name)
    if todo is None:
        assert cpu_reason(False) == ""
    else:
        kernels = f"has no kernels for GPU 0, {card.name} \\(compute capability {card.compute_cap}\\): "
        with pytest.raises(UserError, match=kernels) as refusal:
            cpu_reason(False)
        assert todo in str(refusal.value)


def test_a_driver_that_does_not_answer_while_its_gpu_is_there(machine, monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/nvidia0")
    machine(NO_DRIVER)
    with pytest.raises(
        UserError, match=r"there is a GPU \(/dev/nvidia0\) but nvidia-smi fails: NVIDIA-SMI has failed .*"
    ):
        cpu_reason(False)
    assert cpu_reason(True) == "--use_cpu"


def test_gpus_that_torch_uses_are_not_asked_for(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    machine("exit 1", "0,1")
    assert cpu_reason(False) == ""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"2 processes .* 1 GPU\(s\) that torch can use \(CUDA_VISIBLE_DEVICES=0,1\)"):
        cpu_reason(False)


# ---------------------------------------------------------------- who stops, and who does not

STAGE = ["--train_file_dir", "nowhere", "--do_train", "--output_dir", "out"]
MODEL = ["--base_model", "nowhere"]
STOPPED = {
    "pretraining": ["--model_name_or_path", "nowhere", *STAGE],
    "supervised_finetuning": ["--model_name_or_path", "nowhere", *STAGE],
    "reward_modeling": ["--model_name_or_path", "nowhere", *STAGE],
    "dpo_training": ["--model_name_or_path", "nowhere", *STAGE],
    "ppo_training": ["--sft_model_path", "nowhere", "--reward_model_path", "nowhere", *STAGE],
    "grpo_training": ["--sft_model_path", "nowhere", *STAGE],
    "inference": MODEL,
    "openai_server": MODEL,
    "web_demo": MODEL,
    "evaluate_model": [*MODEL, "--test_file", "nowhere"],
    "generate_preference_data": ["--sft_data", "nowhere", "--output_file", "out.jsonl", "--model", "nowhere"],
}
NOT_STOPPED = {
    "merge_peft_adapter": ["--base_model", "nowhere", "--lora_model", "nowhere", "--output_dir", "out"],
    "export_model": ["--model", "nowhere", "--output_dir", "out"],
    "evaluate_model": ["--predictions", "nowhere"],
    "generate_preference_data": ["--sft_data", "nowhere", "--output_file", "out.jsonl"],
    "check_data": ["--dir", "nowhere"],
    "preprocess_data": ["--input", "nowhere", "--output", "out.jsonl"],
}


@pytest.mark.parametrize("script", STOPPED)
def test_what_runs_a_model_stops_before_it_reads_anything(machine, monkeypatch, tmp_path, script):
    monkeypatch.chdir(tmp_path)
    machine(LISTS_TWO)
    main = import_module(script).main
    with pytest.raises(UserError, match=r"^nvidia-smi lists GPUs \(2 x Fake"):
        main(STOPPED[script])
    with pytest.raises(UserError, match="nowhere"):
        main([*STOPPED[script], "--use_cpu", "True"])


@pytest.mark.parametrize("script", NOT_STOPPED)
def test_what_is_as_good_on_the_cpu_goes_on(machine, monkeypatch, tmp_path, script):
    monkeypatch.chdir(tmp_path)
    machine(LISTS_TWO)
    with pytest.raises(UserError, match="nowhere"):
        import_module(script).main(NOT_STOPPED[script])


@pytest.mark.parametrize("script", [*STOPPED, *NOT_STOPPED])
def test_help_is_given(machine, capsys, script):
    machine(LISTS_TWO)
    with pytest.raises(SystemExit) as stopped:
        import_module(script).main(["--help"])
    assert stopped.value.code in (0, None)
    assert "--use_cpu" in capsys.readouterr().out or script not in STOPPED


@pytest.mark.parametrize("name", ["run_sft.sh", "run_all.sh", "run_eval.sh"])
def test_a_launcher_ends_with_the_line(machine, monkeypatch, name):
    machine(LISTS_TWO)
    monkeypatch.setenv("PYTHON", sys.executable)
    launched = subprocess.run(
        ["bash", str(ROOT / name)], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert launched.returncode == 2
    assert launched.stderr.startswith("error: nvidia-smi lists GPUs (2 x Fake")
    assert launched.stderr.count("\n") == 1
    assert launched.stdout == ""


def test_launchers_are_told_the_choice(machine, capsys):
    machine(LISTS_TWO, "0")
    devices.main(["--help"])
    devices.main(["--learning_rate", "-1e-3", "--use_cpu", "True"])
    assert capsys.readouterr().out.split() == ["1", "cpu"]
    with pytest.raises(UserError):
        devices.main([])
