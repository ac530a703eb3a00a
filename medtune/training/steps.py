"""How many rows and steps a run has, and how many bytes its checkpoints will take."""

import math
from pathlib import Path

from datasets import Dataset, IterableDataset
from transformers import Trainer, TrainingArguments

from medtune.training.checkpoints import n_bytes, optimizer_bytes, refuse_small_disk

Rows = Dataset | IterableDataset


def data_settings(rows: Rows) -> dict[str, int]:
    """Identify the training data: a resumed run skips the rows it has seen, so they must be the same."""
    if is_streamed(rows):
        return {}
    return {"rows of training data": len(rows), "training tokens": sum(rows["length"][:])}


def is_streamed(rows: Rows) -> bool:
    """Whether nobody knows how many rows there are."""
    return isinstance(rows, IterableDataset)


def count_steps(args: TrainingArguments, rows: Rows) -> tuple[int, int, int]:
    """Rows per step, steps per epoch and steps of the run, as Trainer counts them; a streamed run is one epoch."""
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if is_streamed(rows):
        return per_step, args.max_steps, args.max_steps
    steps_per_epoch = max(math.ceil(len(rows) / per_step), 1)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    return per_step, steps_per_epoch, steps


def check_disk(trainer: Trainer) -> None:
    """Refuse a run whose checkpoints will not fit on the disk, by an estimate of their size."""
    args = trainer.args
    refuse_small_disk(Path(args.output_dir), *_estimated_bytes(trainer), _n_saves(trainer), args.save_total_limit)


def _estimated_bytes(trainer: Trainer) -> tuple[int, int]:
    """Of the weights that are saved, and of a checkpoint with the optimizer's states."""
    model = trainer.model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = n_bytes(trained if hasattr(model, "peft_config") else model.parameters())
    return weights, weights + optimizer_bytes(trained, trainer.args)


def _n_saves(trainer: Trainer) -> int:
    """How many checkpoints the whole run writes."""
    args, (_, steps_per_epoch, steps) = trainer.args, count_steps(trainer.args, trainer.train_dataset)
    every = {"no": math.inf, "epoch": steps_per_epoch, "best": args.eval_steps or steps_per_epoch}
    interval = every.get(args.save_strategy.value, args.save_steps)
    if interval < 1:
        interval = math.ceil(interval * steps)
    return math.ceil(steps / interval)


def rows_of_a_batch(args: TrainingArguments) -> int:
    """Of all devices together."""
    return args.train_batch_size * args.world_size
