"""The precision of a run. On a CPU the frozen base of an adapter may be in bfloat16, which some multiply faster.

Adapters, score heads and losses stay in float32, and so do full weights: bfloat16 would round small updates away. Under
autocast, by flag alone, these are rounded for each product and kept in float32.
"""

import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from loguru import logger
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from transformers import TrainingArguments
from transformers.hf_argparser import string_to_bool
from transformers.integrations import is_deepspeed_zero3_enabled

from medtune.arguments import LoraArguments, ModelArguments
from medtune.errors import UserError
from medtune.models.lineage import base_of, is_adapter, read_adapter_config
from medtune.models.loading import load_config
from medtune.training.checkpoints import read_state, recorded_attributes, refuse_changed
from medtune.training.processes import of_main_process

CPU_BF16 = "--cpu_bf16"
AUTOCAST = "autocast"  # weights in float32, products in bfloat16, by Trainer
# In narrower models matrix products are half of a step, and the other half is slower in bfloat16.
SMALLEST_HIDDEN = 512
# How many times as fast bfloat16 products must be: the rest of a step takes up to 1.4 times as long.
LEAST_SPEED = 1.5
# The product that is timed: [rows, hidden] by [hidden, hidden], hidden at most so much; 20 ms on one slow core.
PROBE_ROWS, LARGEST_PROBE = 512, 1024


def base_dtype(
    model_args: ModelArguments,
    lora_args: LoraArguments,
    training_args: TrainingArguments,
    given: Mapping[str, str],
    checkpoint: str | None,
) -> str:
    """The type to load the base in: on a CPU as --cpu_bf16 says, on a GPU --torch_dtype. Logs where it is bfloat16.

    A resumed run keeps the type that it began with, and without a record of one float32.

    Args:
        given: flags of the command (`StageArgumentParser.given`).

    Raises UserError where --cpu_bf16 contradicts another flag or the checkpoint.
    """
    began = recorded_cpu_bf16(checkpoint) if checkpoint else None
    if not training_args.use_cpu:
        if began or model_args.cpu_bf16 == "True":
            of_what = f"the run in {Path(checkpoint).parent} began with it" if began else "True"
            logger.info(f"{CPU_BF16}: {of_what}, for a CPU; on this GPU --torch_dtype and --bf16 decide")
        return model_args.torch_dtype
    requested = _requested(model_args, lora_args, given)
    if began is not None:
        kept = str(began) if requested == "auto" and began != AUTOCAST else requested
        same = f"give {CPU_BF16} {AUTOCAST}" if began == AUTOCAST else f"leave out {CPU_BF16}"
        remedy = {CPU_BF16: f"{same}, and leave out --torch_dtype float32 and --bf16 False"}
        refuse_changed(Path(checkpoint), {CPU_BF16: str(began)}, {CPU_BF16: kept}, remedy)
        in_bfloat16, why = began is True, "as the run began"
    elif requested == "auto":
        # One process decides for all.
        speed = _speed_on_this_cpu(model_args) if training_args.process_index == 0 else 0.0
        speed = of_main_process(speed, training_args)
        in_bfloat16, why = speed >= LEAST_SPEED, f"matrix products are {speed:.1f} times as fast as in float32"
        if speed and not in_bfloat16:
            logger.info(f"{CPU_BF16} auto: float32, since in this CPU's bfloat16 {why}")
    else:
        in_bfloat16, why = requested == "True", "as requested"
    if not in_bfloat16:
        return model_args.torch_dtype
    if not has_bfloat16():
        why += ", slowly: this CPU emulates it"
    logger.info(f"{CPU_BF16} {requested}: the frozen base is in bfloat16 ({why}), the adapter in float32")
    return "bfloat16"


def recorded_cpu_bf16(checkpoint: str) -> bool | str:
    """Whether a run, of PPO too, began with its base in bfloat16 on a CPU, or "autocast"."""
    state = read_state(checkpoint)
    settings = state.get("settings") or recorded_attributes(state.get("stateful_callbacks", {}))
    return settings.get(CPU_BF16, False)


def has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16: AVX512-BF16 or AMX."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def bfloat16_speed(hidden_size: int) -> float:
    """How many times as fast as in float32 this CPU multiplies matrices of a model of this width in bfloat16.

    The instructions do not tell: with AVX512-BF16 alone an Intel Xeon is half as fast as in float32, an AMD EPYC
    four times as fast.
    """
    size = min(hidden_size, LARGEST_PROBE)
    dtypes, n_threads = (torch.float32, torch.bfloat16), torch.get_num_threads()
    matrices = {
        dtype: (torch.ones(PROBE_ROWS, size, dtype=dtype), torch.ones(size, size, dtype=dtype)) for dtype in dtypes
    }
    seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in dtypes}
    torch.set_num_threads(1)  # this thread's own time then counts all of the work and no other program's
    for _ in range(10):
        for dtype, (states, weights) in matrices.items():
            start = time.thread_time()
            F.linear(states, weights)
            seconds[dtype].append(time.thread_time() - start)
    torch.set_num_threads(n_threads)
    return min(seconds[torch.float32]) / min(seconds[torch.bfloat16])


def autocast_where_faster(hidden_size: int) -> str:
    """The --cpu_bf16 for full weights of this width: products in bfloat16 where this CPU is the faster with them."""
    return AUTOCAST if has_bfloat16() and bfloat16_speed(hidden_size) >= LEAST_SPEED else "False"


def cpu_bf16_of(args: TrainingArguments, has_bfloat16_base: bool) -> bool | str:
    """What a checkpoint records of --cpu_bf16, for `recorded_cpu_bf16`; `args` are PPO's and GRPO's too."""
    return args.use_cpu and (AUTOCAST if args.bf16 else has_bfloat16_base)


def has_bfloat16_base(model: torch.nn.Module) -> bool:
    """Whether frozen weights of a model are in bfloat16."""
    return any(weights.dtype == torch.bfloat16 and not weights.requires_grad for weights in model.parameters())


def describe_precision(args: TrainingArguments, model: torch.nn.Module) -> str:
    if args.bf16 or args.fp16:
        base = " over a base in bfloat16, adapter in float32" if args.use_cpu and has_bfloat16_base(model) else ""
        return ("bfloat16 autocast" if args.bf16 else "float16 autocast") + base
    return "base in bfloat16, adapter and loss in float32" if has_bfloat16_base(model) else "float32"


def _speed_on_this_cpu(model_args: ModelArguments) -> float:
    """The speed of bfloat16, 0 where the CPU lacks it or the model is too narrow to gain."""
    config = load_config(base_of(model_args.model_name_or_path), **model_args.hub_options)
    hidden_size = getattr(config.get_text_config(), "hidden_size", 0)
    return bfloat16_speed(hidden_size) if hidden_size >= SMALLEST_HIDDEN and has_bfloat16() else 0.0


def _requested(model_args: ModelArguments, lora_args: LoraArguments, given: Mapping[str, str]) -> str:
    """--cpu_bf16, where `auto` is False if another flag or the adapter keeps the base in float32; True is refused."""
    if model_args.cpu_bf16 == AUTOCAST:
        return AUTOCAST
    obstacles = {
        "--torch_dtype float32": given.get("--torch_dtype") == "float32",
        "--bf16 False": "--bf16" in given and not string_to_bool(given["--bf16"]),
        "--use_peft False, which trains full weights": not lora_args.use_peft,
        "ZeRO-3, which loads the base in float32 on a CPU": is_deepspeed_zero3_enabled(),
    }
    whole = ", ".join(_held_whole(model_args.model_name_or_path, lora_args))
    obstacles[f"an adapter that holds all of {whole}, which bfloat16 would round"] = bool(whole)
    present = [obstacle for obstacle, is_present in obstacles.items() if is_present]
    if present and model_args.cpu_bf16 == "True":
        raise UserError(f"{CPU_BF16} True: not with {present[0]}; leave one of them out")
    return "False" if present else model_args.cpu_bf16


def _held_whole(path: str, lora_args: LoraArguments) -> list[str]:
    """The modules, score heads aside, whose own weights an adapter holds besides LoRA matrices."""
    if is_adapter(path):
        config = read_adapter_config(path)
        trained, targets = config.modules_to_save or (), config.target_modules or ()
    else:
        trained, targets = ((names or "").split(",") for names in (lora_args.modules_to_save, lora_args.target_modules))
    trained, targets = ({name.strip().rpartition(".")[2] for name in names} for names in (trained, targets))
    # PEFT 0.21 saves an embedding or language model's head beside its LoRA matrices.
    return sorted(trained - {"", "score", "classifier"} | targets & set(EMBEDDING_LAYER_NAMES))
