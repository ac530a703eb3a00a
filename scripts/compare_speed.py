"""The cost of training: this project's stages beside TRL's and LLaMA-Factory's, in seconds and memory.

Each side trains the same examples from the same random weights: LoRA of rank 8 on all linear layers, no dropout, no
checkpointing, float32, batches of 4 dialogues or 2 pairs of at most 512 tokens, one epoch, on the CPU. A run is a
process of its own with empty caches; its time counts from the command to its end. The sides take turns, and the table
has medians. Whatever else runs on the machine changes all seconds: compare only what one command measured.

    python scripts/compare_speed.py --jobs sft dpo --rounds 3 --output speed.json
    python scripts/compare_speed.py --peers --baseline ../before --ours "--padding_free True"   # two versions of this
    python scripts/compare_speed.py --jobs --scaling length rows dialogues    # what a token costs as the work grows
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from medtune.errors import UserError, run_script

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("trl", "llamafactory")
MAX_TOKENS = 512
RANK = 8
SEED = 42
# The sample data's replies are short, of 60 tokens: one here is so many of them, drawn for each example.
SAMPLE_REPLIES = (1, 2, 3, 4, 8)
KIB_A_GIB = 2 ** (30 if sys.platform == "darwin" else 20)  # of what getrusage gives, which is bytes on a Mac
FIGURES = ("seconds", "training_seconds", "cpu_seconds", "peak_gib")
HEADER = (
    *("job", "side", "tokens", "seconds", "training", "CPU s", "peak GiB", "loss", "of float32", "of bfloat16"),
    *("ours/it: seconds", "training", "CPU s", "peak"),
)
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}

# ---------------------------------------------------------------- jobs


class Shape(NamedTuple):
    """A decoder, by the names of its configuration."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int

    def linear(self) -> Counter:
        """How often the model has linear layers of (in, out), without the head."""
        hidden, inner = self.hidden_size, self.intermediate_size
        keys = hidden // self.num_attention_heads * self.num_key_value_heads
        block = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden)]  # query, key, value, output
        return Counter([*block, (hidden, inner), (hidden, inner), (inner, hidden)] * self.num_hidden_layers)


SHAPES = {
    "smollm2-135m": Shape("llama", 576, 1536, 30, 9, 3, 49_152),
    "qwen-vocabulary": Shape("qwen2", 256, 512, 2, 4, 2, 151_936),
}


class Job(NamedTuple):
    """What every side trains; flags: of every side."""

    stage: str
    model: str
    n_examples: int
    flags: str = ""


JOBS = {
    "sft": Job("sft", "smollm2-135m", 64),
    "sft-packing": Job("sft", "smollm2-135m", 64, "--packing True"),
    "dpo": Job("dpo", "smollm2-135m", 24),
    "reward": Job("reward", "smollm2-135m", 24),
    "ppo-update": Job("ppo", "smollm2-135m", 16),
    "big-vocabulary-sft": Job("sft", "qwen-vocabulary", 512),
    "big-vocabulary-dpo": Job("dpo", "qwen-vocabulary", 96),
}
PAIRED = ("dpo", "reward")
SHARED = f"""--learning_rate 1e-3 --lr_scheduler_type linear --weight_decay 0 --num_train_epochs 1 --seed {SEED}
    --gradient_accumulation_steps 1 --logging_steps 1 --save_strategy no --report_to none"""
OURS = f"""--do_train --template_name qwen --torch_dtype float32 --gradient_checkpointing False
    --lora_rank {RANK} --lora_alpha {2 * RANK} --lora_dropout 0 --target_modules all"""
PAIR_LIMITS = f"--max_source_length {MAX_TOKENS} --max_target_length {MAX_TOKENS}"
OUR_STAGES = {
    "sft": f"supervised_finetuning.py --model_name_or_path {{model}} --model_max_length {MAX_TOKENS}",
    "dpo": f"dpo_training.py --model_name_or_path {{model}} --beta 0.1 {PAIR_LIMITS}",
    "reward": f"reward_modeling.py --model_name_or_path {{model}} {PAIR_LIMITS}",
    # Two updates of 8 replies. Random weights end none, so that all have 128 tokens.
    "ppo": f"""ppo_training.py --sft_model_path {{model}} --reward_model_path {{model}}-reward --max_steps 2
        --max_source_length {MAX_TOKENS} --response_length 128 --gradient_accumulation_steps 2 --temperature 1
        --learning_rate 1e-5""",
}
TRL = f"""--dtype float32 --bf16 False --use_cpu True --gradient_checkpointing False --disable_tqdm True
    --max_length {MAX_TOKENS} --use_peft True --lora_r {RANK} --lora_alpha {2 * RANK} --lora_dropout 0
    --lora_target_modules all-linear"""
# Not its launcher, which leaves its child alive when it is ended.
TRL_STAGES = {
    "sft": "-m trl.scripts.sft",
    "dpo": "-m trl.scripts.dpo --beta 0.1",
    "reward": "-m trl.scripts.reward --lora_task_type SEQ_CLS",
}
LLAMAFACTORY = f"""--do_train True --use_cpu True --template qwen --dataset train --cutoff_len {MAX_TOKENS}
    --disable_gradient_checkpointing True --finetuning_type lora --lora_rank {RANK} --lora_alpha {2 * RANK}
    --lora_dropout 0 --lora_target all"""
LLAMAFACTORY_STAGES = {"sft": "--stage sft", "dpo": "--stage dpo --pref_beta 0.1", "reward": "--stage rm"}


def command_of(side: str, job: Job, model: Path, data: Path, folder: Path, tree: Path, more: str) -> list[str]:
    """The command of a side; `tree` is the checkout of one that is this project. Of a flag given twice the last counts.

    data: what `write_examples` wrote. folder: of the run, for its outputs and caches.
    """
    batch = f"{SHARED} --per_device_train_batch_size {2 if job.stage in PAIRED else 4} {job.flags}"
    output = ["--output_dir", str(folder / "out")]
    places = [*output, "--model_name_or_path", str(model)]
    if side == "trl":
        words = f"{TRL_STAGES[job.stage]} {batch} {TRL}"
        return [sys.executable, *words.split(), *places, "--dataset_name", str(data / "trl")]
    if side == "llamafactory":
        words = f"llamafactory-cli train {LLAMAFACTORY_STAGES[job.stage]} {batch} {LLAMAFACTORY}"
        return [*words.split(), *places, "--dataset_dir", str(data)]
    script, *own = (word.format(model=model) for word in OUR_STAGES[job.stage].split())
    places = [*output, "--train_file_dir", str(data / "train.jsonl"), "--cache_dir", str(folder / "cache")]
    return [sys.executable, str(tree / script), *f"{batch} {OURS}".split(), *own, *places, *more.split()]


# ---------------------------------------------------------------- models and examples


def in_a_process(function: Callable, *args: Any) -> Any:
    """A function's result from a process of its own: Linux counts our peak memory into that of what we start."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


class Work(NamedTuple):
    """The temporary folder of models, examples and runs, and where records and tokenizer come from."""

    folder: Path
    data: Path
    tokenizer: Path

    def model(self, name: str) -> Path:
        path = self.folder / name
        if not path.exists():
            in_a_process(make_model, path, self, SHAPES[name])
        return path

    def load_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.tokenizer)


def make_model(folder: Path, work: Work, shape: Shape) -> None:
    """Write a causal LM with random float32 weights, and the tokenizer, whose ids are the first of the vocabulary."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(SEED)
    tokenizer = work.load_tokenizer()
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(**shape._asdict(), **ids, max_position_embeddings=8192, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def count_tokens(tokenizer: Any, question: str, reply: str) -> tuple[int, int]:
    """Tokens of a dialogue, and of its reply with the end token."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    return len(tokenizer(whole).input_ids), len(tokenizer(reply).input_ids) + 1


def draw_examples(data: Path, tokenizer: Any, stage: str, n: int, n_joined: Sequence[int]) -> list[tuple[str, ...]]:
    """(question, reply), or (question, chosen, rejected), of texts of at most MAX_TOKENS, from a folder like data/.

    n_joined: from how many records an example's replies are joined, to draw from. Records with a system prompt, earlier
    turns or tools are left out. Raises UserError if there are too few.
    """
    from medtune.reading.readers import load_records, read_dialogues, read_pairs

    folder = data / ("reward" if stage in PAIRED else "finetune")
    records, _ = load_records(read_pairs if stage in PAIRED else read_dialogues, sorted(folder.rglob("*.json*")))
    texts = [[message["content"] for message in record.messages] for record in records]
    if stage in PAIRED:
        texts = [[*asked, record.chosen, record.rejected] for asked, record in zip(texts, records, strict=True)]
    texts = [text for text in texts if len(text) == 2 + (stage in PAIRED)]
    generator = random.Random(SEED)
    generator.shuffle(texts)
    rest, examples = iter(texts), []
    while len(examples) < n:
        parts = list(islice(rest, generator.choice(n_joined)))
        if not parts:
            raise UserError(f"--data {data}: {len(examples)} of {n} examples in {folder}; lower --examples")
        (question, *_), *replies = zip(*parts, strict=True)
        example = (question, *map("\n".join, replies))
        if all(count_tokens(tokenizer, question, reply)[0] <= MAX_TOKENS for reply in example[1:]):
            examples.append(example)
    return examples


def write_examples(folder: Path, examples: Sequence[tuple[str, ...]]) -> None:
    """Write train.jsonl for this project and LLaMA-Factory, dataset_info.json for the latter, and trl/train.jsonl."""
    is_paired = len(examples[0]) == 3
    names = ("question", "response_chosen", "response_rejected") if is_paired else ("question", "answer")
    trl_names = ("prompt", "chosen", "rejected") if is_paired else ("prompt", "completion")
    plain, turns = [], []
    for texts in examples:
        plain.append(dict(zip(names, texts, strict=True)))
        roles = ["user"] + ["assistant"] * (len(texts) - 1)
        messages = [[{"role": role, "content": text}] for role, text in zip(roles, texts, strict=True)]
        turns.append(dict(zip(trl_names, messages, strict=True)))
    columns = {"prompt": "question", "response": "answer", "chosen": "response_chosen", "rejected": "response_rejected"}
    info = {"train": {"file_name": "train.jsonl", "ranking": is_paired, "columns": columns}}
    for name, records in {"train.jsonl": plain, "trl/train.jsonl": turns, "dataset_info.json": [info]}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")


def make_examples(folder: Path, work: Work, stage: str, n: int) -> list[tuple[int, int]]:
    """Draw and write examples; returns the lengths of their texts as `count_tokens` does."""
    tokenizer = work.load_tokenizer()
    n_joined = SAMPLE_REPLIES if work.data == ROOT / "data" else (1,)
    examples = draw_examples(work.data, tokenizer, stage, n, n_joined)
    write_examples(folder, examples)
    return [count_tokens(tokenizer, question, reply) for question, *replies in examples for reply in replies]


# ---------------------------------------------------------------- runs


def run_side(side: str, job: Job, model: Path, data: Path, folder: Path, tree: Path, more: str = "") -> dict:
    """Run a job by a side; returns its figures, peak_gib of its largest process. `folder` keeps what it wrote.

    Raises UserError with the end of its log if it fails.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command, log = command_of(side, job, model, data, folder, tree, more), folder / "log.txt"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= ENVIRONMENT | {"HF_HOME": str(folder / "cache")}
    began = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        finally:
            process.kill()  # does nothing to one that has ended
    seconds, text = time.monotonic() - began, log.read_text(encoding="utf-8", errors="replace")
    if code := os.waitstatus_to_exitcode(status):
        raise UserError(f"{side} ended with {code}; its command and log:\n{command}\n{text[-3000:]}")
    training, losses = read_printed(text) if side == "trl" else read_files(folder / "out")
    figures = (seconds, training, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / KIB_A_GIB, losses[0], losses[-1])
    return dict(zip((*FIGURES, "first_loss", "last_loss"), figures, strict=True))


def read_files(output: Path) -> tuple[float, list[float]]:
    """Seconds of training and the losses, from what a stage of this project or LLaMA-Factory leaves."""
    results = json.loads((output / "train_results.json").read_text(encoding="utf-8"))
    history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    losses = [entry[name] for entry in history for name in ("loss", "policy/loss") if name in entry]
    return results["train_runtime" if "train_runtime" in results else "seconds"], losses


def read_printed(text: str) -> tuple[float, list[float]]:
    """The same from the lines that transformers' Trainer prints, such as {'loss': '10.81', 'epoch': '0.5'}."""
    lines = [dict(re.findall(r"'(\w+)': '?([-+.\w]+)", line)) for line in text.splitlines() if line.startswith("{'")]
    (training,) = (float(line["train_runtime"]) for line in lines if "train_runtime" in line)
    return training, [float(line["loss"]) for line in lines if "loss" in line]


# ---------------------------------------------------------------- what the machine can do


def training_flops(shape: Shape, stage: str, lengths: Sequence[tuple[int, int]]) -> float:
    """FLOPs that a LoRA epoch on texts of (tokens, learned tokens) needs at least, by formula.

    A frozen weight costs 2 a token forward and 2 backward, an adapter's 6. Attention counts its causal half, the head
    the learned tokens alone, and DPO's reference one more forward.
    """
    linear = sum(count * n_in * n_out for (n_in, n_out), count in shape.linear().items())
    adapters = sum(count * RANK * (n_in + n_out) for (n_in, n_out), count in shape.linear().items())
    head = 0 if stage == "reward" else shape.hidden_size * shape.vocab_size
    flops = 0.0
    for tokens, learned in lengths:
        attention = shape.num_hidden_layers * 2 * tokens**2 * shape.hidden_size
        forward = 2 * linear * tokens + 2 * head * learned + attention
        flops += (3 if stage == "dpo" else 2) * forward + attention + 6 * adapters * tokens
    return flops


def measure_matrix_rates(shape: Shape) -> dict[str, float]:
    """FLOPs a second of the model's matrix products on 1,024 rows, by type."""
    import torch

    rates, n_rows = {}, 1024
    for name, dtype in {"float32": torch.float32, "bfloat16": torch.bfloat16}.items():
        flops = seconds = 0.0
        for (n_in, n_out), count in (shape.linear() | Counter([(shape.hidden_size, shape.vocab_size)])).items():
            rows, weight, times = torch.randn(n_rows, n_in, dtype=dtype), torch.randn(n_out, n_in, dtype=dtype), []
            for _ in range(4):
                began = time.monotonic()
                torch.nn.functional.linear(rows, weight)
                times.append(time.monotonic() - began)
            flops += count * 2 * n_rows * n_in * n_out
            seconds += count * min(times)
        rates[name] = flops / seconds
    return rates


# ---------------------------------------------------------------- comparing the sides


def compare(name: str, work: Work, share: float, sides: dict[str, Path], more: str, n_rounds: int) -> dict:
    """A job by all sides that have it: what it is, and of each side the median of every figure and the runs.

    share: of the job's examples. sides: the checkout of each. more: flags of `ours`.
    """
    job = JOBS[name]
    data, model, runs = work.folder / "data", work.model(job.model), {side: [] for side in sides}
    if job.stage == "ppo":  # which the others do not have, and which asks for a reward model with a trained head
        runs = {side: [] for side in sides if side not in PEERS}
        in_a_process(make_examples, data, work, "reward", 4)
        oldest = sides.get("baseline", ROOT)  # which cannot read what a newer one writes
        run_side("ours", job._replace(stage="reward"), model, data, work.folder / "run", oldest)
        shutil.copytree(work.folder / "run" / "out" / "checkpoint-best", f"{model}-reward", dirs_exist_ok=True)
    lengths = in_a_process(make_examples, data, work, job.stage, max(1, round(share * job.n_examples)))
    for number in range(n_rounds):
        for side in list(runs)[:: -1 if number % 2 else 1]:  # they take turns in going first
            run = run_side(side, job, model, data, work.folder / "run", sides[side], more if side == "ours" else "")
            runs[side].append(run)
            took = ", ".join(f"{key} {run[key]:.1f}" for key in FIGURES)
            print(f"{name}, round {number + 1}, {side}: {took}", file=sys.stderr, flush=True)
    medians = {side: {key: median(it[key] for it in own) for key in own[0]} for side, own in runs.items()}
    flops = training_flops(SHAPES[job.model], job.stage, lengths) if job.stage in TRL_STAGES else None
    rates = in_a_process(measure_matrix_rates, SHAPES[job.model])
    n_tokens = sum(tokens for tokens, _ in lengths)
    return {"tokens": n_tokens, "flops": flops, "flops_a_second": rates, "medians": medians, "runs": runs}


def print_job(name: str, result: dict) -> None:
    """Print a row for each side; the last columns are the ratios of this checkout to it."""
    ours, flops = result["medians"]["ours"], result["flops"]
    for side, own in result["medians"].items():
        loss = f"{own['first_loss']:.3f} to {own['last_loss']:.3f}"
        rates = result["flops_a_second"].values()
        shares = [flops / own["training_seconds"] / rate if flops else None for rate in rates]
        ratios = [*shares, *(ours[key] / own[key] if side != "ours" else None for key in FIGURES)]
        cells = [name, side, f"{result['tokens']:,}", *(f"{own[key]:.1f}" for key in FIGURES), loss]
        print_row(*cells, *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios))


def print_row(*cells: object, is_header: bool = False) -> None:
    print(f"| {' | '.join(map(str, cells))} |" + is_header * f"\n{'|---' * len(cells)}|", flush=True)


# ---------------------------------------------------------------- growing work

# (tokens of a row, rows) of a step, at most 8,192 tokens; and dialogues.
STEPS = {"length": [(2**power, 2) for power in range(6, 13)], "rows": [(128, 2**power) for power in range(7)]}
DIALOGUES = (1_000, 10_000, 100_000, 1_000_000)
N_STEPS = 4


def make_equal_rows(folder: Path, work: Work, n_tokens: int, n: int) -> tuple[int, int]:
    """Write n times one dialogue of about n_tokens; returns what `count_tokens` does."""
    tokenizer = work.load_tokenizer()
    ((question, reply),) = draw_examples(work.data, tokenizer, "sft", 1, (1,))
    tokens, learned = count_tokens(tokenizer, question, reply)
    ids = islice(cycle(tokenizer(reply).input_ids), max(1, n_tokens - tokens + learned - 1))
    reply = tokenizer.decode(list(ids)).strip()
    write_examples(folder, [(question, reply)] * n)
    return count_tokens(tokenizer, question, reply)


def measure_training(work: Work, n_tokens: int, n_rows: int, more: str) -> dict:
    """Seconds and FLOPs a token of SFT steps of equal rows; the median of the steps behind the first."""
    data, job = work.folder / "data", Job("sft", "smollm2-135m", n_rows)
    length = in_a_process(make_equal_rows, data, work, n_tokens, n_rows * N_STEPS)
    more = f"--per_device_train_batch_size {n_rows} --model_max_length {2 * n_tokens} {more}"
    run_side("ours", job, work.model(job.model), data, work.folder / "run", ROOT, more)
    state = json.loads((work.folder / "run" / "out" / "trainer_state.json").read_text(encoding="utf-8"))
    rates = [entry["tokens_per_second"] for entry in state["log_history"] if "tokens_per_second" in entry]
    flops = training_flops(SHAPES[job.model], job.stage, [length]) / length[0]
    return {"tokens": length[0], "rows": n_rows, "seconds": 1 / median(rates[1:]), "flops": flops}


def measure_preparation(work: Work, n: int) -> dict:
    """Seconds and peak memory of reading and tokenizing dialogues in one process, with an empty cache."""
    from medtune.arguments import DataArguments
    from medtune.reading.encoders import DialogueEncoder
    from medtune.reading.readers import read_dialogues
    from medtune.reading.stage_data import prepare_part
    from medtune.reading.tokenization import load_chat_template

    tokenizer = work.load_tokenizer()
    examples = draw_examples(work.data, tokenizer, "sft", min(n, 1000), (1,))
    with tempfile.TemporaryDirectory(dir=work.folder) as folder:
        dialogues = Path(folder, "dialogues.jsonl")
        with dialogues.open("w", encoding="utf-8") as file:
            for number, (question, reply) in enumerate(islice(cycle(examples), n)):
                file.write(json.dumps({"question": f"{number}: {question}", "answer": reply}) + "\n")
        encoder = DialogueEncoder(tokenizer, load_chat_template(tokenizer, "qwen"), MAX_TOKENS, "drop", False)
        began = time.monotonic()
        prepare_part("train", [dialogues], False, read_dialogues, encoder, DataArguments(), SEED, folder)
        seconds = time.monotonic() - began
    return {"dialogues": n, "seconds": seconds, "peak_gib": getrusage(RUSAGE_SELF).ru_maxrss / KIB_A_GIB}


def grow(axis: str, work: Work, share: float, more: str) -> list[dict]:
    """Measure and print one axis; returns its rows. share: of the dialogues."""
    results = []
    if axis == "dialogues":
        print_row("dialogues", "seconds", "microseconds a dialogue", "peak GiB", is_header=True)
        for n in (max(1, round(share * n)) for n in DIALOGUES):
            results.append(row := in_a_process(measure_preparation, work, n))
            print_row(f"{n:,}", f"{row['seconds']:.1f}", f"{1e6 * row['seconds'] / n:.0f}", f"{row['peak_gib']:.2f}")
        return results
    print_row("tokens of a row", "rows", "ms a token", "MFLOP a token", "GFLOP/s", is_header=True)
    for n_tokens, n_rows in STEPS[axis]:
        results.append(row := measure_training(work, n_tokens, n_rows, more))
        seconds, flops = row["seconds"], row["flops"]
        print_row(row["tokens"], n_rows, f"{1e3 * seconds:.2f}", f"{flops / 1e6:.0f}", f"{flops / seconds / 1e9:.0f}")
    return results


# ---------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> dict:
    """Parse the flags, make the tokenizer, run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", nargs="*", choices=JOBS, default=list(JOBS), help="which to run; none: no job")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument("--examples", type=float, default=1.0, help="share of each job's examples")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS, help="to compare with; none: ours alone")
    parser.add_argument("--baseline", type=Path, metavar="TREE", help="another checkout of this project as a side")
    parser.add_argument("--ours", default="", metavar="FLAGS", help="more flags of this checkout's stages, in quotes")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="folder with finetune/ and reward/")
    parser.add_argument("--scaling", nargs="*", choices=[*STEPS, "dialogues"], default=[], help="axes to grow")
    parser.add_argument("--output", type=Path, help="JSON file of all figures")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.examples <= 0:
        raise UserError("--rounds and --examples: give numbers above 0")
    sides = {"ours": ROOT}
    if args.baseline:
        sides["baseline"] = args.baseline.resolve()
        if not (sides["baseline"] / "supervised_finetuning.py").is_file():
            raise UserError(f"--baseline {args.baseline}: no checkout of this project; name its folder")
    sides |= dict.fromkeys(args.peers, ROOT)
    if "llamafactory" in sides and shutil.which("llamafactory-cli") is None:
        print("LLaMA-Factory is left out: there is no llamafactory-cli on the PATH", file=sys.stderr)
        del sides["llamafactory"]

    found: dict = {"jobs": {}, "scaling": {}}
    with tempfile.TemporaryDirectory(prefix="compare-speed-") as name:
        work = Work(Path(name), args.data.resolve(), Path(name, "tokenizer"))
        make = [sys.executable, ROOT / "scripts" / "build_tiny_model.py", "--output_dir", work.tokenizer]
        subprocess.run([*make, "--data_dir", ROOT / "data"], check=True, capture_output=True)
        try:
            if args.jobs:
                print_row(*HEADER, is_header=True)
            for job in args.jobs:
                found["jobs"][job] = compare(job, work, args.examples, sides, args.ours, args.rounds)
                print_job(job, found["jobs"][job])
            for axis in args.scaling:
                found["scaling"][axis] = grow(axis, work, args.examples, args.ours)
        finally:
            if args.output:
                args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that runs and folder end with it
    run_script(main)
