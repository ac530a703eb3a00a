"""Explain a full memory or disk in one line, with the remedies that the run has left."""

import errno
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from accelerate.utils.memory import should_reduce_batch_size
from safetensors import SafetensorError
from transformers import Trainer, TrainingArguments

from medtune.errors import UserError
from medtune.training.checkpoints import UNFINISHED, mount_point, numbered_checkpoints
from medtune.training.steps import is_streamed


def explain_full_in_training(trainer: Trainer) -> AbstractContextManager:
    return explain_full_memory_or_disk(Path(trainer.args.output_dir), lambda: _out_of_memory_advice(trainer))


@contextmanager
def explain_full_memory_or_disk(output_dir: Path, out_of_memory_advice: Callable[[], str]) -> Iterator[None]:
    """If memory or disk is full, raise UserError with what to do."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if _is_memory_full(error):
            raise UserError(out_of_memory_advice()) from error
        if not _is_disk_full(error):
            raise
        raise UserError(_disk_full_advice(output_dir)) from error


def _is_memory_full(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def _is_disk_full(error: Exception) -> bool:
    """Whether the disk is full; torch and safetensors write without Python and have their own messages."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return any(sign in str(error) for sign in ("inline_container.cc", "PytorchStreamWriter failed", "No space left"))


def _disk_full_advice(output_dir: Path) -> str:
    shutil.rmtree(output_dir / UNFINISHED, ignore_errors=True)
    whole = numbered_checkpoints(output_dir)
    last = f"the last complete checkpoint is {whole[0]}" if whole else "no checkpoint was complete yet"
    return (
        f"no space left on the disk at {mount_point(output_dir)} for --output_dir {output_dir}; {last}. Make room "
        "(--save_total_limit 1 keeps one checkpoint), then the same command with --resume_from_checkpoint True goes on"
    )


def batch_remedies(args: TrainingArguments) -> list[str]:
    """The remedies not yet used: half the batch with the same rows a step, and gradient checkpointing."""
    batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    remedies = []
    if batch > 1:
        longer = math.ceil(accumulation * batch / (batch // 2))
        remedies.append(
            f"--per_device_train_batch_size {batch // 2} --gradient_accumulation_steps {longer} (now {batch} and "
            f"{accumulation})"
        )
    if not args.gradient_checkpointing:
        remedies.append("--gradient_checkpointing True")
    return remedies


def _out_of_memory_advice(trainer: Trainer) -> str:
    """The remedies that this run has not taken yet, mildest first, with its own values."""
    args, model = trainer.args, trainer.model
    if not model.training and args.per_device_eval_batch_size > 1:
        half = args.per_device_eval_batch_size // 2
        return f"out of memory in an evaluation: --per_device_eval_batch_size {half}"
    remedies = batch_remedies(args)
    is_adapter = hasattr(model, "peft_config")
    if not is_adapter:
        remedies.append("--use_peft True")
    if not getattr(model, "is_quantized", False):
        remedies.append("--load_in_4bit True")
    if not is_streamed(trainer.train_dataset):
        longest, columns = max(trainer.train_dataset["length"][:]), trainer.train_dataset.column_names
        if "prompt_ids" in columns:
            flag = "a shorter --max_source_length or --max_target_length"
        else:
            flag = f"--{'block_size' if 'seq_lengths' in columns else 'model_max_length'} {longest // 2}"
        remedies.append(f"{flag} (the longest row has {longest} tokens)")
    if is_adapter and (rank := model.peft_config["default"].r) > 1:
        remedies.append(f"--lora_rank {rank // 2} (now {rank})")
    return f"out of memory at step {trainer.state.global_step + 1}; in this order: {'; '.join(remedies)}"
