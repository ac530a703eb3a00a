"""How true is the estimate of memory? Runs of every stage on the CPU, each beside its estimate, and a table.

The truth is the process's own peak of resident memory from the loading of its model on, less what it had before. Every
run is a process of its own, forked from one that has imported the libraries, with one thread; large tensors are given
back to the system when they are freed (MALLOC_MMAP_THRESHOLD_). Each stage's combinations are dealt in turn into two
halves: the constant of `medtune/estimate/memory.py` for a CPU is fitted on the first, and the error is that of the
second.

    python tests/compare_memory.py measure memory.jsonl             # half an hour; goes on where it stopped
    python tests/compare_memory.py table memory.jsonl
"""

import argparse
import gc
import importlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests")]

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_MMAP_THRESHOLD_": "262144",
    "MALLOC_ARENA_MAX": "1",
}
MIB = 2**20
PAGE = 1024  # elements of a page of memory, at most
SCRIPTS = {
    "pt": "pretraining",
    "sft": "supervised_finetuning",
    "rm": "reward_modeling",
    "dpo": "dpo_training",
    "ppo": "ppo_training",
    "grpo": "grpo_training",
    "distillation": "distillation_training",
}
# What loads models, in its order.
LOADERS = {"ppo": ["load_roles"], "grpo": ["load_roles"], "distillation": ["load_teacher", "load_roles"]}
TEACHER = "52M"
# hidden, intermediate, layers, heads, key-value heads, vocabulary
SHAPES = {
    "16M": (384, 1024, 8, 6, 2, 4000),
    "52M": (512, 1536, 8, 8, 2, 60000),
    "135M": (576, 1536, 30, 9, 3, 49152),
    "0.5B": (896, 4864, 24, 14, 2, 151936),
}
NO_CHECKPOINTS = "--gradient_checkpointing False"
# Stage, shape, tokens of the longest row, and flags beside those of `flags_of`.
COMBINATIONS = [
    ("sft", "16M", 512, "--per_device_train_batch_size 2"),
    ("sft", "16M", 512, "--per_device_train_batch_size 8"),
    ("sft", "16M", 1024, "--per_device_train_batch_size 4"),
    ("sft", "16M", 1024, "--per_device_train_batch_size 2 --gradient_checkpointing True"),
    ("sft", "16M", 2000, "--per_device_train_batch_size 1"),
    ("sft", "16M", 512, "--per_device_train_batch_size 2 --lora_rank 64"),
    ("sft", "16M", 512, "--per_device_train_batch_size 4 --padding_free False"),
    ("sft", "16M", 1024, "--per_device_train_batch_size 1 --packing True"),
    ("sft", "52M", 256, "--per_device_train_batch_size 4"),
    ("sft", "52M", 256, "--per_device_train_batch_size 4 --use_peft False"),
    ("sft", "52M", 256, "--per_device_train_batch_size 2 --load_in_4bit True"),
    ("sft", "52M", 256, "--per_device_train_batch_size 2 --load_in_8bit True"),
    ("sft", "52M", 256, "--per_device_train_batch_size 4 --cpu_bf16 True"),
    ("sft", "135M", 256, "--per_device_train_batch_size 1 --gradient_checkpointing True"),
    ("sft", "0.5B", 128, "--per_device_train_batch_size 1 --gradient_checkpointing True"),
    ("pt", "16M", 512, "--per_device_train_batch_size 4"),
    ("pt", "16M", 1024, "--per_device_train_batch_size 4"),
    ("pt", "16M", 1024, "--per_device_train_batch_size 2 --gradient_checkpointing True"),
    ("pt", "52M", 256, "--per_device_train_batch_size 4 --lora_rank 32"),
    ("pt", "52M", 256, "--per_device_train_batch_size 2 --use_peft False"),
    ("rm", "16M", 512, "--per_device_train_batch_size 2"),
    ("rm", "16M", 512, "--per_device_train_batch_size 4"),
    ("rm", "16M", 512, "--per_device_train_batch_size 2 --gradient_checkpointing True"),
    ("rm", "16M", 512, "--per_device_train_batch_size 2 --padding_free False"),
    ("rm", "52M", 256, "--per_device_train_batch_size 2 --lora_rank 32"),
    ("rm", "52M", 256, "--per_device_train_batch_size 2 --load_in_4bit True"),
    ("dpo", "16M", 512, "--per_device_train_batch_size 2"),
    ("dpo", "16M", 512, "--per_device_train_batch_size 4"),
    ("dpo", "16M", 512, "--per_device_train_batch_size 1"),
    ("dpo", "16M", 512, "--per_device_train_batch_size 2 --gradient_checkpointing True"),
    ("dpo", "16M", 512, "--per_device_train_batch_size 2 --padding_free False"),
    ("dpo", "52M", 256, "--per_device_train_batch_size 2 --use_peft False"),
    ("dpo", "52M", 256, "--per_device_train_batch_size 2 --loss_type orpo"),
    ("ppo", "16M", 256, "--per_device_train_batch_size 2 --response_length 64"),
    ("ppo", "16M", 512, "--per_device_train_batch_size 4 --response_length 128"),
    ("ppo", "16M", 256, "--per_device_train_batch_size 4 --response_length 32 --gradient_checkpointing True"),
    ("ppo", "16M", 256, "--per_device_train_batch_size 2 --response_length 32 --rollout_batch_size 4"),
    ("ppo", "52M", 256, "--per_device_train_batch_size 2 --response_length 32"),
    ("ppo", "16M", 256, "--per_device_train_batch_size 4 --response_length 32 --padding_free False"),
    ("grpo", "16M", 256, "--per_device_train_batch_size 4 --response_length 64"),
    ("grpo", "16M", 256, "--per_device_train_batch_size 4 --response_length 64 --beta 0.1"),
    ("grpo", "16M", 256, "--per_device_train_batch_size 8 --response_length 32 --gradient_checkpointing True"),
    ("grpo", "52M", 256, "--per_device_train_batch_size 4 --response_length 32"),
    ("grpo", "16M", 256, "--per_device_train_batch_size 8 --response_length 32 --lora_rank 32"),
    ("grpo", "16M", 256, "--per_device_train_batch_size 4 --response_length 32 --padding_free False"),
    ("distillation", "16M", 256, "--per_device_train_batch_size 4 --response_length 32"),
    ("distillation", "16M", 256, "--per_device_train_batch_size 4 --response_length 64 --beta 0.5"),
]

# ---------------------------------------------------------------- models and data


def make_models(folder: Path) -> None:
    """Every shape with random weights, and a reward model on each of the first two."""
    from build_tiny_model import write_tiny_model
    from conftest import TEXTS
    from random_adapters import random_reward_adapter
    from transformers import Qwen2Config, Qwen2ForCausalLM

    for name, (hidden, intermediate, layers, heads, kv_heads, vocabulary) in SHAPES.items():
        if (folder / name / "config.json").is_file():
            continue
        write_tiny_model(folder / name, TEXTS * 2, vocab_size=600)
        config = Qwen2Config(
            hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=True, eos_token_id=2,
        )  # fmt: skip
        Qwen2ForCausalLM(config).save_pretrained(folder / name)
        random_reward_adapter(folder / name, folder / f"{name}-rm")


def letters(rng: random.Random, n_tokens: int) -> str:
    """Text of about so many tokens: no two letters are one."""
    return "".join(rng.choices("bcdfghjklmnpqrstvwxz", k=max(n_tokens, 1)))


def write_data(stage: str, n_tokens: int, file: Path) -> None:
    """Rows of two thirds of the length to all of it, with room for the template."""
    rng = random.Random(f"{stage} {n_tokens}")
    records = []
    for _ in range(64):
        n = int((n_tokens - 48) * rng.uniform(0.67, 1))
        if stage == "pt":
            records.append({"text": letters(rng, n)})
        elif stage == "sft":
            records.append({"question": letters(rng, n // 4), "answer": letters(rng, n - n // 4)})
        elif stage in ("rm", "dpo"):
            replies = {f"response_{name}": letters(rng, n // 2) for name in ("chosen", "rejected")}
            records.append({"question": letters(rng, n - n // 2)} | replies)
        else:
            records.append({"question": letters(rng, n), "answer": letters(rng, 20)})
    file.parent.mkdir(parents=True, exist_ok=True)
    # Of GRPO, whose replies must differ in it to be learned from.
    variety = "def variety(replies, records):\n    return [float(len(set(reply.text))) for reply in replies]\n"
    file.with_name("variety.py").write_text(variety, encoding="utf-8")
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def flags_of(stage: str, shape: str, n_tokens: int, flags: str, models: Path, folder: Path) -> list[str]:
    model = "--sft_model_path" if stage in LOADERS else "--model_name_or_path"
    words = f"{model} {models / shape} --train_file_dir {folder / 'data.jsonl'} --do_train --use_cpu True"
    words += f" --max_steps 2 --gradient_accumulation_steps 2 --logging_steps 1 --output_dir {folder / 'out'}"
    words += f" --cache_dir {folder / 'cache'} --save_strategy no"
    if "cpu_bf16" not in flags:
        words += " --cpu_bf16 False"
    if "gradient_checkpointing" not in flags:
        words += f" {NO_CHECKPOINTS}"
    if stage != "pt":
        words += " --template_name qwen"
    words += {
        "pt": f" --block_size {n_tokens}",
        "sft": f" --model_max_length {n_tokens}",
        "rm": f" --max_source_length {n_tokens} --max_target_length {n_tokens}",
        "dpo": f" --max_source_length {n_tokens} --max_target_length {n_tokens}",
        "ppo": f" --max_source_length {n_tokens} --reward_model_path {models / f'{shape}-rm'}",
        "grpo": f" --max_source_length {n_tokens} --rewards variety --num_generations 4 "
        f"--reward_file {folder / 'variety.py'} --stop_token <|im_start|>",
        "distillation": f" --max_source_length {n_tokens} --teacher_model_path {models / TEACHER}",
    }[stage]
    return f"{words} {flags}".split()


# ---------------------------------------------------------------- one run and its estimate


def resident(name: str = "VmRSS") -> int:
    """Bytes of memory of this process by its name in /proc."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def run_stage(stage: str, argv: list[str]) -> float:
    """The peak of a run from its model on, in bytes."""
    module = importlib.import_module(SCRIPTS[stage])
    before = []

    def load_and_note(name: str, load: Callable, *args, **options) -> object:
        gc.collect()
        before.append(resident())
        loaded = load(*args, **options)
        model = loaded[0].model if name == "load_roles" else loaded.model if name == "load_teacher" else loaded
        for weights in model.parameters():
            weights.detach().view(-1)[::PAGE].sum()  # rows of a mapped file come into memory as they are read
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        return loaded

    for name in LOADERS.get(stage, ["load_for_training"]):
        setattr(module, name, partial(load_and_note, name, getattr(module, name)))
    module.main(argv)
    return resident("VmHWM") - before[0]


def estimate(stage: str, argv: list[str]) -> dict:
    from medtune.estimate.making import Command, measure_command

    memory = measure_command(Command(importlib.import_module(SCRIPTS[stage]), argv)).memory
    stays = sum(memory.parts.values())
    return {"stays": stays, "moment": max(memory.moments.values()), "decides": memory.decides}


def in_child(compute: Callable, *args: object, log: Path) -> object:
    """What a function returns in a process forked from this one; raises RuntimeError where it fails."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def run() -> None:
        with log.open("a", encoding="utf-8") as file, redirect_stderr(file):
            os.dup2(file.fileno(), 2)
            try:
                sender.send(compute(*args))
            except BaseException:
                traceback.print_exc()
                raise

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        raise RuntimeError(log.read_text(encoding="utf-8")[-1500:]) from None
    finally:
        process.join()
    return result


def in_turn(combinations: list[tuple]) -> list[tuple]:
    """Stage by stage in turn, so that a part of them has all stages."""
    by_stage = [[each for each in combinations if each[0] == stage] for stage in SCRIPTS]
    return [each for row in zip_longest(*by_stage) for each in row if each]


def measure_all(output: Path, models: Path, chosen: list[str]) -> None:
    for name in ("medtune.libraries", *SCRIPTS.values(), "medtune.estimate.making"):
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as scratch:
        in_child(make_models, models, log=Path(scratch, "models"))
        done = [json.loads(line)["name"] for line in output.read_text().splitlines()] if output.is_file() else []
        for number, (stage, shape, n_tokens, flags) in enumerate(in_turn(COMBINATIONS)):
            name = f"{stage} {shape} {n_tokens} {flags}"
            if name in done or (chosen and stage not in chosen):
                continue
            folder = Path(scratch, str(number))
            write_data(stage, n_tokens, folder / "data.jsonl")
            argv = flags_of(stage, shape, n_tokens, flags, models, folder)
            computed = in_child(estimate, stage, argv, log=folder / "log")
            peak = in_child(run_stage, stage, argv, log=folder / "log")
            values = {"name": name, "stage": stage, "shape": shape, "tokens": n_tokens, "flags": flags, "peak": peak}
            with output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values | computed) + "\n")
            print(
                f"{name}: {peak / MIB:.0f} MiB, computed {(computed['stays'] + computed['moment']) / MIB:.0f}",
                flush=True,
            )


# ---------------------------------------------------------------- the table


def halves(runs: list[dict]) -> tuple[list[dict], list[dict]]:
    """Of each stage every second run, and the others."""
    parts: tuple[list[dict], list[dict]] = ([], [])
    for stage in SCRIPTS:
        for index, run in enumerate(run for run in runs if run["stage"] == stage):
            parts[index % 2].append(run)
    return parts


def fit(runs: list[dict]) -> float:
    """The constant, fixed bytes, with the least squares of relative errors."""
    weighted = [(run["peak"] - run["stays"] - run["moment"], run["peak"] ** -2) for run in runs]
    return sum(beside * weight for beside, weight in weighted) / sum(weight for _, weight in weighted)


def print_table(file: Path) -> None:
    from statistics import mean

    runs = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    first, second = halves(runs)
    fixed = fit(first)
    print(f"fitted on {len(first)} runs: {fixed / MIB:.0f} MiB beside what is counted\n")
    print("| run | half | measured, MiB | estimate, MiB | error |")
    print("|---|---|---|---|---|")
    errors: dict[str, list[float]] = {}
    for half, part in (("first", first), ("second", second)):
        for run in part:
            total = run["stays"] + run["moment"] + fixed
            error = total / run["peak"] - 1
            errors.setdefault(half, []).append(error)
            if half == "second":
                errors.setdefault(run["stage"], []).append(error)
            print(f"| {run['name']} | {half} | {run['peak'] / MIB:.0f} | {total / MIB:.0f} | {error:+.1%} |")
    print()
    for name, values in errors.items():
        within = sum(abs(value) <= 0.1 for value in values)
        print(
            f"{name}: {len(values)} runs, mean |error| {mean(map(abs, values)):.1%}, largest "
            f"{max(map(abs, values)):.1%}, {within} within 10 %"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("measure", "table"))
    parser.add_argument("file", type=Path, help="of the runs, a JSON line each")
    parser.add_argument("--models", type=Path, default=Path("models/memory"), help="for random weights")
    parser.add_argument("--stages", nargs="*", default=[], choices=SCRIPTS, help="only these")
    args = parser.parse_args()
    if args.do == "table":
        print_table(args.file)
        return
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        # What malloc reads at the start.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ENVIRONMENT)
    measure_all(args.file, args.models, args.stages)


if __name__ == "__main__":
    main()
