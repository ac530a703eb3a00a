"""Do two versions of this repository train alike? 20 steps of every stage in each, and a table of what differs.

A change that only moves code must leave every figure bitwise equal. A new trainer may round otherwise: its first loss
and first gradients agree to 1e-5, its 20 losses to 1e-4 relative, without dropout. A version is a folder with a
checkout; its stages are run as a user runs them (script, flags, data/), and nothing of it is imported, so versions
whose modules lie elsewhere can be compared. All runs are in float32 on one thread of the CPU, from one seed.

    git worktree add ../before HEAD~1
    python tests/compare_losses.py losses ../before --model ../start > before.json    # three minutes of one idle core
    python tests/compare_losses.py losses . --model ../start > after.json
    python tests/compare_losses.py compare before.json after.json                     # --bitwise where code only moved

`--model` is the folder of what the runs start from, made by the first version that is run: a two-layer Qwen2, an SFT
adapter and a reward model on it. `compare` ends with 1 where the versions do not train alike.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

STEPS = 20
FIRST_LIMIT = 1e-5  # of the first loss and of the first gradients
LOSSES_LIMIT = 1e-4
# The gradient of a tensor is held against its own norm; one below this share of the largest norm, against that share.
SMALLEST_SHARE = 1e-3
# PPO's figures have both signs and are held against the largest of the run, or against this: the policy loss of
# advantages with mean 0 is rounding until the policy has moved.
SMALLEST_SCALE = 0.01
# What the log says about the machine.
OF_THE_MACHINE = re.compile("per_second|memory|runtime|epoch$|^step$")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

TRAINED = f"""--do_train --max_steps {STEPS} --logging_steps 1 --save_strategy steps --save_steps 1 --seed 42
    --torch_dtype float32 --lora_dropout 0 --lora_rank 8 --lora_alpha 16 --target_modules all --learning_rate 1e-3
    --gradient_accumulation_steps 2 --gradient_checkpointing False --report_to none"""
BASE = "--model_name_or_path {model}/base --per_device_train_batch_size 2"
PT = f"pretraining.py {BASE} --train_file_dir {{data}}/pretrain --block_size 128"
DIALOGUES = "--train_file_dir {data}/finetune/medical_sft_1K_format.jsonl --template_name qwen"
SFT = f"supervised_finetuning.py {BASE} {DIALOGUES} --model_max_length 256"
PAIRS = """--per_device_train_batch_size 2 --train_file_dir {data}/reward/dpo_zh_500.jsonl --template_name qwen
    --max_source_length 128 --max_target_length 128"""
RM = f"reward_modeling.py --model_name_or_path {{model}}/base {PAIRS}"
DPO = f"dpo_training.py --model_name_or_path {{model}}/sft {PAIRS}"
PPO = f"""ppo_training.py --sft_model_path {{model}}/sft --reward_model_path {{model}}/reward {DIALOGUES}
    --per_device_train_batch_size 4 --rollout_batch_size 8 --max_source_length 128
    --response_length 16 --missing_eos_penalty 1 --temperature 1"""
JOBS = {
    "pt": PT,
    "sft": SFT,
    "sft-packing": f"{SFT} --packing True",
    "sft-whole": f"{SFT} --use_peft False",
    "rm": RM,
    "dpo-sigmoid": DPO,
    "dpo-whole": f"{DPO.replace('/sft', '/base')} --use_peft False --learning_rate 1e-4",
    "dpo-ipo": f"{DPO} --loss_type ipo",
    "dpo-hinge": f"{DPO} --loss_type hinge",
    "dpo-sigmoid-sft": f"{DPO} --loss_type sigmoid sft --loss_weights 1 0.5",
    "dpo-orpo": f"{DPO} --loss_type orpo",
    "dpo-simpo": f"{DPO} --loss_type simpo",
    # One step an update, whose gradients are then the first ones; and several, where ratios and values get clipped.
    "ppo-once": f"{PPO} --num_ppo_epochs 1 --num_mini_batches 1",
    "ppo-again": f"{PPO} --num_ppo_epochs 2 --num_mini_batches 2",
}
# Learns within 20 steps to end its replies, without which PPO stops.
START_SFT = f"supervised_finetuning.py {BASE} --train_file_dir {{model}}/short.jsonl --template_name qwen"
START = {"sft": f"{START_SFT} --learning_rate 1e-2", "reward": f"{RM} --learning_rate 1e-2"}

# ---------------------------------------------------------------- running a version


def run(words: Iterable[str | Path], tree: Path) -> None:
    """A script of a version, in its folder; its log is shown only where it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ENVIRONMENT
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"in {tree}: {' '.join(command)}\n{done.stderr[-4000:]}\nended with {done.returncode}")


def run_stage(job: str, tree: Path, model: Path, data: Path, folder: Path) -> Path:
    """Twenty steps of a stage; returns the folder with its results."""
    output = folder / "out"
    script, *own = (word.format(model=model, data=data) for word in job.split())
    places = ["--output_dir", output, "--cache_dir", folder.parent / "cache"]
    run([script, *TRAINED.split(), *places, *own], tree)  # of a flag that is given twice the last one counts
    return output


def make_start(tree: Path, model: Path, data: Path, folder: Path) -> None:
    """What the runs start from: base, sft and reward; the folder is there once all are."""
    run(["scripts/build_tiny_model.py", "--output_dir", model / "base", "--vocab_size", "1024"], tree)
    # What a block of that model adds begins so small that an adapter on it changes nothing.
    shrunk = json.loads((model / "base/config.json").read_text(encoding="utf-8"))["initializer_range"]
    weights = load_file(model / "base/model.safetensors")
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] /= shrunk
    save_file(weights, model / "base/model.safetensors", metadata={"format": "pt"})
    answers = [f"{part}疼请就诊。" for part in "头胃背膝手肩耳牙"] * 10
    lines = [json.dumps({"question": f"第{n}个病人怎么办？", "answer": answer}) for n, answer in enumerate(answers)]
    (model / "short.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for name, job in START.items():
        shutil.copytree(run_stage(job, tree, model, data, folder / name) / "checkpoint-best", model / name)


def digest(files: Iterable[Path]) -> str:
    """Of names and contents, in this order; of weights the tensors, not what is written beside them."""
    whole = hashlib.sha256()
    for file in files:
        whole.update(file.name.encode())
        if file.suffix == ".safetensors":
            for name, tensor in sorted(load_file(file).items()):
                whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                whole.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            whole.update(file.read_bytes())
    return whole.hexdigest()


def digest_of_start(model: Path, data: Path) -> str:
    """Of the models and of the data that the runs read."""
    files = [path for part in ("pretrain", "finetune", "reward") for path in sorted((data / part).glob("*.*"))]
    return digest([*sorted(model.glob("*/*.safetensors")), *files])


# ---------------------------------------------------------------- what a run leaves


def read_results(output: Path) -> dict:
    """Figures by step, first gradients and last weights.

    The figures stand in trainer_state.json as Python writes floats, to the last bit; the log rounds them, and
    TensorBoard's events are in single precision. Checkpoint 1 holds Adam's first moment, which after one step is the
    clipped gradient x 0.1 (in ppo-again, whose updates are four steps, a mean of their gradients).
    """
    history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    steps = [entry for entry in history if "loss" in entry or "policy/loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, STEPS + 1)), output
    names = [name for name in steps[0] if not OF_THE_MACHINE.search(name)]
    optimizer = torch.load(output / "checkpoint-1/optimizer.pt", weights_only=True)
    learners = {"": optimizer} if "state" in optimizer else {f"{role}/": its for role, its in optimizer.items()}
    return {
        "figures": {name: [entry.get(name) for entry in steps] for name in names},
        "gradients": {prefix: list(first_gradients(its)) for prefix, its in learners.items()},
        "weights": digest(sorted((output / "checkpoint-best").glob("*.safetensors"))),
    }


def first_gradients(optimizer: dict) -> Iterator[tuple[float, float]]:
    """Of each trained tensor the norm and a product with a fixed vector, which tells directions apart."""
    for _, state in sorted(optimizer["state"].items()):
        gradient = state["exp_avg"].double().flatten()
        yield gradient.norm().item(), (gradient @ torch.arange(len(gradient)).double().cos()).item()


def collect(tree: Path, model: Path, data: Path, jobs: list[str]) -> dict:
    """The results of a version, by job; makes the start where it is missing."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not model.exists():
            make_start(tree, model, data, folder / "start")
        if not (model / "reward").exists():
            sys.exit(f"--model {model}: not a finished start of these runs; name another folder, or remove it")
        found = {"start": digest_of_start(model, data), "jobs": {}}
        for job in jobs:
            began = time.monotonic()
            output = run_stage(JOBS[job], tree, model, data, folder / job)
            found["jobs"][job] = read_results(output)
            shutil.rmtree(output)
            print(f"{job}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return found


# ---------------------------------------------------------------- comparing two


def difference(before: list[float], after: list[float], scale: float = 0) -> float:
    """The largest one, relative to the figure itself without a `scale`."""
    pairs = zip(before, after, strict=True)
    return largest(abs(a - b) / (scale or max(abs(a), abs(b)) or 1) for a, b in pairs)


def scale_of(figures: list[float]) -> float:
    return max(SMALLEST_SCALE, *map(abs, figures))


def gradient_difference(before: list, after: list) -> float:
    """The largest one of a tensor's norm or product, relative to the norm."""
    if len(before) != len(after):
        return math.inf
    floor = SMALLEST_SHARE * max(norm for norm, _ in before) or 1
    pairs = list(zip(before, after, strict=True))
    return largest(max(abs(a[0] - b[0]), abs(a[1] - b[1])) / max(a[0], b[0], floor) for a, b in pairs)


def largest(values: Iterable[float]) -> float:
    """The maximum, infinite where one is not a number."""
    return max(math.inf if math.isnan(value) else value for value in values)


def compare(before: dict, after: dict, bitwise: bool) -> bool:
    """Print the tables; whether the versions train alike."""
    if before["start"] != after["start"]:
        sys.exit("these runs had other models or data to start from: give both the same --model and --data")
    missing = before["jobs"].keys() ^ after["jobs"].keys()
    pairs = {job: (old, after["jobs"][job]) for job, old in before["jobs"].items() if job not in missing}
    print(f"{'':<17}{'first loss':>13}{'then':>13}{'differs':>9}  20 losses  norms    first grads  bitwise equal")
    rows = [compare_learner(job, role, *pair) for job, pair in pairs.items() for role in pair[0]["gradients"]]
    for job, pair in pairs.items():
        if "" not in pair[0]["gradients"]:
            compare_figures(job, *(result["figures"] for result in pair))
    for job in sorted(missing):
        print(f"{job}: run in one of the two only")
    alike = not missing and all(is_same or (is_near and not bitwise) for is_same, is_near in rows)
    limits = f"first losses and gradients within {FIRST_LIMIT:g}, all losses within {LOSSES_LIMIT:g}"
    print(f"\nThey {'train alike' if alike else 'do NOT train alike'} ({'bitwise' if bitwise else limits}).")
    return alike


def compare_learner(job: str, role: str, old: dict, new: dict) -> tuple[bool, bool]:
    """Print a row, of a run or of one of PPO's two models; whether the runs are bitwise equal, and whether near.

    Bitwise equal are all figures of the log, the first gradients and the last weights.
    """
    losses, norms = ([its["figures"][f"{role}{name}"] for its in (old, new)] for name in ("loss", "grad_norm"))
    scale = scale_of(losses[0]) if role else 0
    of_first, of_losses = difference(losses[0][:1], losses[1][:1], scale), difference(*losses, scale)
    of_gradients = gradient_difference(old["gradients"][role], new["gradients"][role])
    is_same = json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True)  # which writes floats to the last bit
    is_near = max(of_first, of_gradients) <= FIRST_LIMIT and of_losses <= LOSSES_LIMIT
    verdict = "yes" if is_same else "no" if is_near else "no, and TOO FAR"
    print(f"{f'{job} {role[:-1]}':<17}{losses[0][0]:>13.8f}{losses[1][0]:>13.8f}{of_first:>9.1e}", end="")
    print(f"{of_losses:>11.1e}{difference(*norms):>9.1e}{of_gradients:>13.1e}  {verdict}")
    return is_same, is_near


def compare_figures(job: str, old: dict, new: dict) -> None:
    """Print the figures of PPO's updates."""
    print(f"\n{job:<24}{'update 1':>12}{'then':>12}{f'update {STEPS}':>12}{'then':>12}  {STEPS} differ  bitwise equal")
    for name in [name for name in old if name in new]:
        ends = "".join(f"{its[name][step]:>12.5f}" for step in (0, -1) for its in (old, new))
        of_all = difference(old[name], new[name], scale_of(old[name]))
        print(f"{name:<24}{ends}{of_all:>11.1e}  {'yes' if json.dumps(old[name]) == json.dumps(new[name]) else 'no'}")


# ---------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    losses = commands.add_parser("losses", help="run every stage of a version; the results go to standard output")
    losses.add_argument("tree", type=Path, help="folder of a checkout")
    losses.add_argument("--model", type=Path, required=True, help="what the runs start from; made where it is missing")
    losses.add_argument("--data", type=Path, help="instead of data/ in the checkout, where versions differ in it")
    losses.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS), help="only these runs")
    both = commands.add_parser("compare", help="the table of two results; ends with 1 where they are not alike")
    both.add_argument("before", type=Path)
    both.add_argument("after", type=Path)
    both.add_argument("--bitwise", action="store_true", help="nothing but bitwise equal is alike: code only moved")
    args = parser.parse_args()
    if args.command == "losses":
        tree = args.tree.resolve()
        data = (args.data or tree / "data").resolve()
        print(json.dumps(collect(tree, args.model.resolve(), data, args.jobs), indent=1))
    else:
        results = [json.loads(file.read_text(encoding="utf-8")) for file in (args.before, args.after)]
        sys.exit(not compare(*results, args.bitwise))


if __name__ == "__main__":
    main()
