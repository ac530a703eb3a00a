"""A stage's run from its start to its results.

A stage calls `start_run`, `log_facts`, `train` and `finish_run`; the callbacks do the rest.
"""

import math
import sys
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

from accelerate.utils import other as accelerate_other
from loguru import logger
from transformers import ProgressCallback, Trainer, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging

from medtune.arguments import RunArguments
from medtune.models.lineage import Lineage
from medtune.training.checkpoints import (
    BEST,
    find_checkpoint,
    no_other_run,
    read_state,
    recorded_settings,
    refuse_other_settings,
)
from medtune.training.guards import AdapterMovementCheck, BadSteps
from medtune.training.interruption import NothingLeftError, StoppedInEvaluationError, StopSignals, exit_interrupted
from medtune.training.keeper import CheckpointKeeper
from medtune.training.log import (
    EVALUATED,
    ProgressLines,
    QuietProgressBar,
    device_name,
    memory_figures,
    plot_curves,
    start_log,
    version_notes,
)
from medtune.training.out_of_memory import explain_full_in_training
from medtune.training.processes import leave_process_group
from medtune.training.steps import Rows, check_disk, count_steps, data_settings


def start_run(stage: str, training_args: TrainingArguments, run_args: RunArguments, notes: list[str]) -> str | None:
    """Set up log and seeds, log versions and device, and find the checkpoint to resume from.

    Args:
        notes: one line for each flag that the parser changed.
    """
    import datasets

    is_main = training_args.process_index == 0
    start_log(is_main)
    # Libraries' own warnings, once and not once a process.
    (transformers_logging.set_verbosity_warning if is_main else transformers_logging.set_verbosity_error)()
    if training_args.disable_tqdm or not is_main:
        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()
    # transformers 5.24 and PEFT 0.21 still call each other by names that transformers renamed.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)
    set_seed(training_args.seed)
    # accelerate 1.15 imports it, for a second or more, to look whether a model is wrapped by it.
    accelerate_other.is_deepspeed_available = lambda: bool(training_args.deepspeed)
    if training_args.deepspeed and training_args.use_cpu:
        _start_deepspeed_on_the_cpu()
    logger.info(f"{stage}: {training_args.world_size} process(es) on {device_name(training_args)}")
    for line in [*notes, *version_notes()]:
        logger.info(line)
    return find_checkpoint(training_args, run_args.overwrite_output_dir)


def _start_deepspeed_on_the_cpu() -> None:
    """Initialize DeepSpeed's process group, which accelerate 1.15 does on GPUs only; ZeRO-3 needs it."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for a minute
    deepspeed.init_distributed(dist_backend="gloo")


def is_finished(training_args: TrainingArguments, rows: Rows, lineage: Lineage, checkpoint: str | None) -> bool:
    """Whether the run to resume is finished with its results written; logs that nothing is trained.

    Resuming it would overwrite the results, and train one step too many within an epoch.
    Raises UserError where the run was started with other training data or from other weights, or is finished with
    other flags.
    """
    if checkpoint is None or not training_args.do_train:
        return False
    refuse_other_settings(Path(checkpoint), data_settings(rows))
    output_dir = Path(training_args.output_dir)
    state = read_state(checkpoint)
    finished = state["global_step"] >= count_steps(training_args, rows)[2] and (output_dir / "loss.png").is_file()
    lineage.refuse_other_run(checkpoint, finished)
    if not finished:
        return False
    leave_finished_run(output_dir, f"{state['global_step']} steps")
    return True


def leave_finished_run(output_dir: Path, done: str) -> None:
    """Say that nothing is trained, and how it would be."""
    logger.warning(
        f"{output_dir} holds a finished run ({done}): nothing is trained. To train it again: "
        "--resume_from_checkpoint False --overwrite_output_dir True, or another --output_dir"
    )
    leave_process_group()


def train(
    trainer: Trainer,
    lineage: Lineage,
    checkpoint: str | None,
    run_args: RunArguments,
    hub_options: dict,
) -> CheckpointKeeper | None:
    """Train with this package's callbacks and write `train_results.json`; None without --do_train.

    Args:
        lineage: recorded in every checkpoint.
        checkpoint: what `start_run` returned.
        hub_options: with which the base was loaded.

    Exits with 128 + signal number if a signal stopped the run, after its checkpoint is saved. Raises UserError if
        memory or disk is full, or too many steps are bad.
    """
    if not trainer.args.do_train:
        return None
    check_disk(trainer)
    logging_dir = run_args.logging_dir  # of TensorBoard's events; None for runs/ in the output folder
    # Trainer then keeps the best loss in its state, which a resumed run reads.
    trainer.args.metric_for_best_model = "eval_loss"
    trainer.args.greater_is_better = False
    trainer.remove_callback(PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        # transformers 5 takes the folder from an environment variable, and ./runs without it.
        if isinstance(callback, TensorBoardCallback) and (logging_dir or callback.logging_dir is None):
            callback.logging_dir = logging_dir or str(Path(trainer.args.output_dir, "runs"))
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(QuietProgressBar)
    stop = StopSignals(trainer)
    keeper = CheckpointKeeper(trainer, lineage, stop, hub_options)
    movement_check = AdapterMovementCheck()
    bad_steps = BadSteps(trainer, run_args.max_bad_steps, movement_check)
    for callback in (ProgressLines(), movement_check, bad_steps, keeper, stop):
        trainer.add_callback(callback)
    if checkpoint:
        recorded = recorded_settings(checkpoint)
        # LongestFirstSampler keeps the order that the run began with, whatever a step is now made of.
        trainer.n_longest_first = recorded.get("n_longest_first")
        trainer.args.eval_on_start |= bool(trainer.eval_dataset) and recorded.get("evaluation_is_due", False)
    alone = no_other_run(Path(trainer.args.output_dir)) if trainer.args.process_index == 0 else nullcontext()
    with explain_full_in_training(trainer), alone:
        try:
            metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        except NothingLeftError:
            metrics = trainer._finalize_training(None, 0, time.time()).metrics
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            metrics["train_loss"] = math.fsum(losses) / max(len(losses), 1)
        except StoppedInEvaluationError:
            trainer._save_checkpoint(trainer.model, trial=None)
            keeper.on_save(trainer.args, trainer.state, trainer.control)
        if stop.received:
            step, steps = trainer.state.global_step, trainer.state.max_steps
            saved = Path(trainer.args.output_dir, f"checkpoint-{step}")
            exit_interrupted(stop.received, f"step {step}/{steps}", saved)
        metrics |= memory_figures()
        trainer.save_metrics("train", metrics, combined=False)
        trainer.save_state()
    return keeper


def finish_run(trainer: Trainer, keeper: CheckpointKeeper | None, next_command: str) -> dict[str, float]:
    """Evaluate, make sure of `checkpoint-best`, write results and curves, and name the next command.

    `eval_results.json` describes the model in `checkpoint-best`. Returns its metrics ({} without evaluation data).
    """
    output_dir = Path(trainer.args.output_dir)
    metrics: dict[str, float] = {}
    with explain_full_in_training(trainer):
        if trainer.args.do_eval and trainer.eval_dataset is not None:
            metrics = _last_evaluation(trainer, keeper)
            trainer.save_metrics("eval", metrics, combined=False)
        if keeper is not None and keeper.best_step is None:
            keeper.best_step = trainer.state.global_step
            keeper.save_best()
    leave_process_group()
    if not trainer.is_world_process_zero():
        return metrics
    if keeper is not None:
        plot_curves(trainer.state.log_history, output_dir / "loss.png")
        logger.info(f"done: {output_dir / BEST} (step {keeper.best_step} of {trainer.state.global_step})")
    if metrics:
        names = [f"eval_{name}" for name in EVALUATED if f"eval_{name}" in metrics]
        logger.info("evaluation: " + "  ".join(f"{name} {metrics[name]:.4f}" for name in names))
    logger.info(f"results: {output_dir}; curves: tensorboard --logdir {output_dir}")
    logger.info(f"next: {next_command}")
    return metrics


def inference_command(lineage: Lineage, best: Path, use_peft: bool) -> str:
    """The command that asks what a run left: an adapter on its base, or a whole model."""
    flags = f"--base_model {lineage.base_model} --lora_model {best}" if use_peft else f"--base_model {best}"
    return f"{Path(sys.executable).name} inference.py {flags}"


def _last_evaluation(trainer: Trainer, keeper: CheckpointKeeper | None) -> dict[str, float]:
    """Metrics of checkpoint-best: from the log if it was evaluated during training, otherwise measured now."""
    evaluated = {entry["step"]: entry for entry in trainer.state.log_history if "eval_loss" in entry}
    if keeper is None or trainer.state.global_step not in evaluated:
        latest = trainer.evaluate()
        if keeper is None or keeper.best_step in (None, trainer.state.global_step):
            return latest
    # No step is the best where no evaluation gave a number.
    return evaluated[trainer.state.global_step if keeper.best_step is None else keeper.best_step]
