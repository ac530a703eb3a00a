"""Checkpoints on the disk: find the one to resume from, and write them whole or not at all.

A folder is written under `UNFINISHED` and then renamed; its manifest shows later damage.
"""

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from loguru import logger
from transformers import TrainingArguments

from medtune.errors import UserError
from medtune.output_files import existing_part
from medtune.training.processes import of_main_process

BEST = "checkpoint-best"
ROWS_A_STEP = "rows a step"
PADDING_FREE = "--padding_free"
# In a checkpoint: the SHA-256 of its files, as `sha256sum --check` reads it.
MANIFEST = "manifest.sha256"
# In the output folder: checkpoints are written in it, and moved out of it once they are whole.
UNFINISHED = ".unfinished"
# Tokenizer, configuration and states of a checkpoint, in bytes, beside its weights and optimizer.
SMALL_FILES = 16 * 2**20


# ---------------------------------------------------------------- where a run starts


def find_checkpoint(training_args: TrainingArguments, overwrite_output_dir: bool) -> str | None:
    """The checkpoint to resume from, None for a new run. An earlier run is never overwritten.

    `--resume_from_checkpoint True` takes the newest complete checkpoint, a path that one. Otherwise an output folder
    that holds a run is refused, or with `--overwrite_output_dir` moved beside the new one.
    """
    output_dir = Path(training_args.output_dir)
    requested = training_args.resume_from_checkpoint
    if training_args.process_index == 0 and output_dir.is_dir():
        with no_other_run(output_dir):
            pass  # the lock itself is for the time of writing
    if requested and overwrite_output_dir and numbered_checkpoints(output_dir):
        logger.info(
            "--overwrite_output_dir: nothing is overwritten, because --resume_from_checkpoint goes on with the run"
        )
    if requested:
        checkpoint_path = None
        # Hashing a large model takes a while: one process does it and broadcasts the result.
        if training_args.process_index == 0:
            _clear_unfinished(output_dir)
            checkpoint_path = (
                _checked_checkpoint(requested) if isinstance(requested, str) else _newest_checkpoint(output_dir)
            )
        checkpoint_path = of_main_process(checkpoint_path, training_args)
        if checkpoint_path:
            if not Path(checkpoint_path).is_dir():
                raise UserError(
                    f"{checkpoint_path}: not there on every node; --output_dir must be a folder that they share"
                )
            if getattr(training_args, "padding_free", None) == "auto":
                # As the run began, which before this flag was with padding: dropout draws by the layout.
                training_args.padding_free = recorded_settings(checkpoint_path).get(PADDING_FREE, "False")
            refuse_other_settings(Path(checkpoint_path), run_settings(training_args), _rows_of_a_step(training_args))
            logger.info(f"resuming from {checkpoint_path}")
            return checkpoint_path
        logger.info(f"--resume_from_checkpoint True: no checkpoint in {output_dir} yet, so the run starts anew")
    # One process moves the folder; the others look when it is done.
    with training_args.main_process_first(local=False, desc="the output folder"):
        contents = [name for name in ("train_results.json", "trainer_state.json", BEST) if (output_dir / name).exists()]
        contents += [checkpoint.name for checkpoint in numbered_checkpoints(output_dir)]
        if training_args.process_index != 0:
            return None
        if not contents:
            _clear_unfinished(output_dir)
            return None
        # Stopped before its first checkpoint: the same command must go on by itself.
        has_barely_begun = requested is True and contents == [BEST]
        if not overwrite_output_dir and not has_barely_begun:
            raise UserError(
                f"--output_dir {output_dir} holds a run already ({', '.join(contents)}): --resume_from_checkpoint True "
                "goes on with it, --overwrite_output_dir True starts again and keeps it beside, or name another folder"
            )
        number = 1
        while (aside := output_dir.with_name(f"{output_dir.name}.earlier-{number}")).exists():
            number += 1
        output_dir.rename(aside)
        logger.info(f"starting again: the earlier run in {output_dir} is now {aside}")
    return None


@contextmanager
def no_other_run(output_dir: Path) -> Iterator[None]:
    """Lock the output folder, which is created if needed; raises UserError if another run holds the lock.

    The lock ends with the block, or with the process.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(output_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--output_dir {output_dir}: another run is writing in it; wait for its end, stop it, or name another"
            ) from None
        except OSError as error:
            logger.info(f"--output_dir {output_dir} cannot be locked ({error.strerror}): start no second run in it")
        yield
    finally:
        os.close(descriptor)


def mount_point(folder: Path) -> Path:
    folder = folder.resolve()
    while not folder.is_mount():
        folder = folder.parent
    return folder


def _checked_checkpoint(checkpoint: str) -> str:
    if faults := checkpoint_faults(Path(checkpoint)):
        raise UserError(f"--resume_from_checkpoint {checkpoint}: {faults}; take another checkpoint of the run")
    return checkpoint


def _newest_checkpoint(output_dir: Path) -> str | None:
    """The newest complete checkpoint; damaged ones are skipped with a warning."""
    for checkpoint in numbered_checkpoints(output_dir):
        faults = checkpoint_faults(checkpoint)
        if not faults:
            return str(checkpoint)
        logger.warning(f"{checkpoint} is not complete ({faults}) and is skipped")
    return None


def numbered_checkpoints(output_dir: Path) -> list[Path]:
    """checkpoint-N folders, the newest first."""
    if not output_dir.is_dir():
        return []
    numbered = [path for path in output_dir.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]
    return sorted(numbered, key=_step_of, reverse=True)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def delete_oldest(written: Path, save_total_limit: int | None) -> None:
    """Delete all but the newest checkpoints; transformers 5.24 would count and delete checkpoint-best.

    written: the newest. Those of later steps, which a run that went back to an earlier one has left behind it, do not
        count: damaged as they may be, they would take the place of a whole one.
    """
    if save_total_limit:
        own = [path for path in numbered_checkpoints(written.parent) if _step_of(path) <= _step_of(written)]
        for checkpoint in own[save_total_limit:]:
            shutil.rmtree(checkpoint)


def checkpoint_faults(checkpoint: Path) -> str:
    """What keeps a checkpoint from an exact resume, "" where it is complete.

    transformers stops for a missing state or weights, but goes on silently without optimizer or random state.
    """
    if not checkpoint.is_dir():
        return "no such folder"
    needed = {
        "weights": ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json"),
        "trainer_state.json": ("trainer_state.json",),
        "optimizer": ("optimizer.pt", "global_step*"),  # DeepSpeed keeps it in global_stepN/
        "scheduler.pt": ("scheduler.pt",),
        "random state": ("rng_state*.pth",),
    }
    missing = [what for what, patterns in needed.items() if not any(any(checkpoint.glob(p)) for p in patterns)]
    if "trainer_state.json" not in missing:
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except ValueError:
            missing.append("a readable trainer_state.json")
    if missing:
        return f"without {', '.join(missing)}"
    try:
        manifest = _read_manifest(checkpoint)
    except ValueError:
        return f"damaged: {MANIFEST}"
    damaged = [name for name, digest in manifest.items() if _sha256(checkpoint / name) != digest]
    return f"damaged: {', '.join(damaged)}" if damaged else ""


def run_settings(training_args: TrainingArguments) -> dict[str, float | str]:
    """The settings that a resumed run must keep.

    The rows that are done are told by the number of steps alone: with other rows in a step some would be trained twice,
    some never.
    """
    seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
    return optimizer_settings(training_args) | {
        ROWS_A_STEP: math.prod(_batch(training_args)),
        "--seed or --data_seed": seed,
        "--train_sampling_strategy": str(training_args.train_sampling_strategy),
        # Each has a part of the optimizer, and without DeepSpeed those parts would be left unread.
        PADDING_FREE: getattr(training_args, "padding_free", None),
        "processes under DeepSpeed": training_args.world_size if training_args.deepspeed else 0,
    }


def optimizer_settings(training_args: TrainingArguments) -> dict[str, float | str]:
    """Those of the optimizer, which brings its own values with it from a checkpoint: new ones would have no effect."""
    names = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
    settings = {f"--{name}": getattr(training_args, name) for name in names}
    return settings | {"--optim": str(training_args.optim.value)}


def _batch(training_args: TrainingArguments) -> tuple[int, int, int]:
    args = training_args
    return args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size


def _rows_of_a_step(training_args: TrainingArguments) -> dict[str, str]:
    one, accumulated, n_processes = _batch(training_args)
    made_of = f"{one} a device x {accumulated} accumulated x {n_processes} process(es)"
    return {ROWS_A_STEP: f"make their product what it was ({made_of} now: on half the GPUs accumulate twice as many)"}


def read_state(checkpoint: str | Path) -> dict:
    return json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))


def refuse_other_settings(
    checkpoint: Path, requested: dict[str, float | int | str], remedies: dict[str, str] | None = None
) -> None:
    """Refuse settings other than those `CheckpointKeeper` recorded; a checkpoint without a record passes."""
    refuse_changed(checkpoint, recorded_settings(checkpoint), requested, remedies)


def recorded_settings(checkpoint: str | Path) -> dict:
    """What `CheckpointKeeper` recorded in a checkpoint on the disk; {} without a record."""
    return recorded_attributes(read_state(checkpoint).get("stateful_callbacks", {}))


def refuse_changed(
    checkpoint: Path, recorded: dict, requested: dict[str, float | int | str], remedies: dict[str, str] | None = None
) -> None:
    """Raise UserError if a setting of a resumed run is not the recorded one.

    remedies: what to do, by setting.
    """
    for name, value in requested.items():
        if recorded.get(name, value) != value:
            raise UserError(
                f"{name} {value}: the run in {checkpoint.parent} was started with {recorded[name]}, and a resumed run "
                f"goes on with that; {(remedies or {}).get(name, 'leave it as it was')}, start again "
                "(--resume_from_checkpoint False --overwrite_output_dir True), or name another --output_dir"
            )


def recorded_attributes(stateful_callbacks: dict) -> dict:
    """What `CheckpointKeeper` wrote into a checkpoint."""
    return stateful_callbacks.get("CheckpointKeeper", {}).get("attributes", {})


def follow_schedule(scheduler: torch.optim.lr_scheduler.LRScheduler, step: int, output_dir: Path) -> str | None:
    """Set the learning rate of a resumed run by this command's schedule; the message if it jumps.

    The checkpoint brings the rate of the old schedule, 0 at its end, which one step would still be made with.
    """
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        return None
    factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    rates = [factor * rate for factor, rate in zip(factors, scheduler.base_lrs, strict=True)]
    old = scheduler.get_last_lr()[0]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
    if math.isclose(old, rates[0], rel_tol=1e-6):
        return None
    return (
        f"another learning rate schedule than the run in {output_dir} was started with, by other steps, epochs or "
        f"warmup: its next rate was {old:.2e}, and step {step + 1} is made with {rates[0]:.2e}; a new run that "
        f"starts from {output_dir / BEST} has a whole schedule"
    )


# ---------------------------------------------------------------- room on the disk


def n_bytes(weights: Iterable[torch.nn.Parameter], each: int | None = None) -> int:
    """The bytes of the full weights (ZeRO's parts included), in their precision or with so many bytes each."""
    return sum(getattr(weight, "ds_numel", weight.numel()) * (each or weight.element_size()) for weight in weights)


def optimizer_bytes(trained: Iterable[torch.nn.Parameter], training_args: TrainingArguments) -> int:
    """Of the optimizer's states of the weights that are trained."""
    if training_args.deepspeed:
        return n_bytes(trained, 12)  # float32 weights and Adam's two moments
    if "8bit" in training_args.optim.value:
        return n_bytes(trained, 2)
    return 0 if training_args.optim.value in ("adafactor", "sgd") else 2 * n_bytes(trained)


def refuse_small_disk(output_dir: Path, weights: int, checkpoint: int, n_saves: int, limit: int | None) -> None:
    """Raise UserError if the run's checkpoints will not fit on the disk.

    Args:
        weights, checkpoint: bytes of what checkpoint-best holds, and of a checkpoint without its small files.
        n_saves, limit: checkpoints that the whole run writes, and how many of them are kept (None for all).
    """
    checkpoint += SMALL_FILES
    # Each checkpoint is whole before an old one is deleted, and so is checkpoint-best.
    n_kept = min(n_saves, limit + 1) if limit else n_saves
    n_new = max(n_kept - len(numbered_checkpoints(output_dir)), min(n_kept, 1))
    needed = n_new * checkpoint + 2 * (weights + SMALL_FILES)
    folder = existing_part(output_dir)
    free = shutil.disk_usage(folder).free
    summary = f"{n_kept} checkpoint{'s' * (n_kept != 1)} of about {checkpoint / 2**30:.2f} GiB and checkpoint-best"
    if free < needed:
        raise UserError(
            f"--output_dir {output_dir}: the run writes {summary}, which takes {needed / 2**30:.2f} GiB more, and the "
            f"disk at {mount_point(folder)} has {free / 2**30:.2f} GiB left; make room, or keep fewer: "
            "--save_total_limit 1"
        )
    logger.info(f"disk: {summary}, {free / 2**30:.1f} GiB are free")


# ---------------------------------------------------------------- checkpoints that are whole


def unfinished_folder(place: Path) -> Path:
    """An empty folder to write into; `put_in_place` then moves it to `place`."""
    partial = place.parent / UNFINISHED / place.name
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def put_in_place(place: Path) -> None:
    """Move a folder that is written to its place in one step, its files safely on the disk before.

    A folder that stood there comes back (`find_checkpoint`) should the process be killed between the two moves.
    """
    unfinished = place.parent / UNFINISHED
    partial, replaced = unfinished / place.name, unfinished / f"{place.name}.replaced"
    for file in _files(partial):
        _sync(file)
    if place.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        place.rename(replaced)
    partial.rename(place)
    _sync(place.parent)
    shutil.rmtree(unfinished)


def write_manifest(checkpoint: Path) -> None:
    """Record the SHA-256 of all files of a checkpoint in it."""
    lines = [f"{_sha256(file)}  {file.relative_to(checkpoint)}\n" for file in _files(checkpoint)]
    (checkpoint / MANIFEST).write_text("".join(lines), encoding="utf-8")


def _read_manifest(checkpoint: Path) -> dict[str, str]:
    """SHA-256 by file name; {} without a manifest (another tool's checkpoint). Raises ValueError for a broken one."""
    file = checkpoint / MANIFEST
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}


def _sha256(file: Path) -> str | None:
    if not file.is_file():
        return None
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clear_unfinished(output_dir: Path) -> None:
    """Remove the checkpoint that a killed run was writing, and restore one that it was replacing."""
    unfinished = output_dir / UNFINISHED
    if not unfinished.is_dir():
        return
    for path in unfinished.iterdir():
        place = output_dir / path.name.removesuffix(".replaced")
        if path.name.endswith(".replaced") and not place.exists():
            path.rename(place)
        elif path.name == place.name:
            logger.warning(f"{path.name} was being written when the run ended and is not complete: it is removed")
    shutil.rmtree(unfinished)
