"""Short runs of the stages: their flags and data, and processes of their own that can be killed."""

import importlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedModel

from medtune.arguments import LoraArguments
from medtune.errors import run_script
from medtune.models import adapters

ROOT = Path(__file__).resolve().parents[1]
PARTS = ["头", "胃", "背", "膝", "手", "肩", "耳", "牙"]
STAGES = {"pt": "pretraining", "sft": "supervised_finetuning", "rm": "reward_modeling", "dpo": "dpo_training"}
RL_STAGES = {"ppo": "ppo_training", "grpo": "grpo_training", "distillation": "distillation_training"}
ADAPTER_FILES = {
    *("README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "lineage.json"),
    *("tokenizer.json", "tokenizer_config.json"),
}
# Of a numbered checkpoint, besides its manifest.
STATE_FILES = {"optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin"}
# Of a run that was evaluated, besides its checkpoints.
RESULTS = {"eval_results.json", "loss.png", "train_results.json", "trainer_state.json"}


def write_data(stage: str, folder: Path, n_records: int = 32) -> Path:
    """The records of a stage in a folder of their own."""
    data = folder / f"data-{stage}"
    data.mkdir(exist_ok=True)
    questions = [f"第{n}个病人{PARTS[n % 8]}疼怎么办？" for n in range(n_records)]
    answers = [f"{PARTS[n % 8]}疼{n}天以上请就诊，平时注意休息。" for n in range(n_records)]
    if stage == "pt":
        (data / "texts.txt").write_text("\n\n".join(map("".join, zip(questions, answers, strict=True))))
        return data
    if stage == "sft":
        records = [{"question": q, "answer": a} for q, a in zip(questions, answers, strict=True)]
    else:
        records = [
            {"question": q, "response_chosen": a, "response_rejected": "不用管。"}
            for q, a in zip(questions, answers, strict=True)
        ]
    write_lines(data / "records.jsonl", records)
    return data


def load_for_training(path: str, **options) -> PreTrainedModel | PeftModel:
    """`adapters.load_for_training`, with flags of LoRA among the options."""
    of_lora = {spec.name: options.pop(spec.name) for spec in fields(LoraArguments) if spec.name in options}
    return adapters.load_for_training(path, LoraArguments(**of_lora), **options)


def write_lines(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def words(values: Mapping[str, object]) -> list[str]:
    """Flags; None is left out, a list gives several values."""
    given = {name: value if isinstance(value, list) else [value] for name, value in values.items() if value is not None}
    return [word for name, several in given.items() for word in (f"--{name}", *map(str, several))]


def stage_flags(stage: str, model: Path, folder: Path, **changes) -> list[str]:
    """A short run's flags; keywords replace or add some, None removes one, a list gives several values."""
    values = {
        "model_name_or_path": model,
        "train_file_dir": changes.get("train_file_dir") or write_data(stage, folder),
        "do_train": True,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "gradient_checkpointing": False,
        "save_strategy": "steps",
        "save_steps": 2,
        "output_dir": folder / "out",
        "cache_dir": folder / "cache",
    }
    values |= {"block_size": 64} if stage == "pt" else {"template_name": "qwen"}
    return words(values | changes)


def train(stage: ModuleType, folder: Path, model: Path, records: list[dict], *flags: str) -> Path:
    """What a few steps of a stage leave."""
    data = write_lines(folder / "data.jsonl", records)
    options = "--do_train --template_name qwen --max_steps 2 --learning_rate 1e-2 --gradient_checkpointing False"
    files = f"--train_file_dir {data} --output_dir {folder / 'out'} --cache_dir {folder / 'cache'}"
    stage.main([*f"--model_name_or_path {model} {options} {files}".split(), *flags])
    return folder / "out/checkpoint-best"


def train_sft(folder: Path, model: Path, *flags: str) -> Path:
    records = [{"question": f"{part}疼怎么办？", "answer": f"{part}疼请就诊。"} for part in PARTS]
    return train(importlib.import_module("supervised_finetuning"), folder, model, records, *flags)


# ---------------------------------------------------------------- what a run left


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(7, 47).reshape(2, 20)).logits


def logged(output_dir: Path, name: str = "loss") -> dict[int, float]:
    """A figure of the log by step."""
    history = json.loads((output_dir / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return {entry["step"]: entry[name] for entry in history if name in entry}


def history(output_dir: Path) -> list[dict]:
    """The entries of the log of PPO, GRPO or distillation."""
    return json.loads((output_dir / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


def updates(output_dir: Path, name: str) -> list[float]:
    """A figure of the updates, in their order."""
    return [entry[name] for entry in history(output_dir) if name in entry]


# ---------------------------------------------------------------- processes


def run_process(script: str, argv: list[str], n_processes: int = 1, **environment: str) -> subprocess.CompletedProcess:
    """A script as its users start it: with python, or several of it with torchrun."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n_processes)]
    command = [sys.executable, *(launch if n_processes > 1 else []), script, *argv]
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "check": False}
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, **options)


# A server imports the libraries once, which takes half a minute, and forks a process for each run.
_server = multiprocessing.get_context("forkserver")


def start_stage(stage: str, argv: list[str], log: Path, **variables: str) -> multiprocessing.Process:
    """A running stage with these variables in its environment; its log is added to a file."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # Python 3.11 hands no sys.path on
    _server.set_forkserver_preload([*STAGES.values(), "deepspeed"])
    process = _server.Process(target=_run, args=((STAGES | RL_STAGES)[stage], argv, log, variables))
    process.start()
    return process


def start_two_processes(stage: str, argv: list[str], log: Path, **of_second: str) -> list[multiprocessing.Process]:
    """A running stage in two processes, told of each other as torchrun does; some variables for the second alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    world = where | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [
        start_stage(stage, argv, log, **world, RANK="0", LOCAL_RANK="0"),
        start_stage(stage, argv, log, **world, RANK="1", LOCAL_RANK="1", **of_second),
    ]


def train_in(stage: str, n_processes: int, folder: Path, argv: list[str]) -> str:
    """Run in one process or two that are told of each other as torchrun does, until they have ended with 0; the log."""
    log = folder / f"{n_processes}.log"
    if n_processes == 2:
        processes = start_two_processes(stage, argv, log)
    else:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        processes = [start_stage(stage, argv, log, **alone)]
    end_well(processes, log)
    return log.read_text()


def end_well(processes: list[multiprocessing.Process], log: Path) -> None:
    """Wait until all have ended with 0."""
    for process in processes:
        process.join(500)
        if process.exitcode != 0:
            for other in processes:
                other.kill()
        assert process.exitcode == 0, log.read_text()[-4000:]


def _run(module: str, argv: list[str], log: Path, variables: dict[str, str]) -> None:
    os.environ.update(variables)
    if "SIGTERM_AT_STEP" in variables:
        _send_sigterm_within(int(variables["SIGTERM_AT_STEP"]))
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    run_script(lambda: importlib.import_module(module).main(argv))


def _send_sigterm_within(step: int) -> None:
    """To this process, between the micro-batches of the step behind so many."""
    from medtune.training.log import ProgressLines

    def send(self, args, state, control, **kwargs):
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    ProgressLines.on_substep_end = send


def short_rl_run(folder: Path, **own) -> dict:
    """The flags of a short run of PPO, GRPO or distillation in a folder; those of the stage replace or add some."""
    return {
        "template_name": "qwen",
        "do_train": True,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "response_length": 12,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "output_dir": folder / "out",
        "cache_dir": folder / "cache",
    } | own
