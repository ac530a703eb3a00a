"""What surrounds training in every stage: the log, where a run starts and resumes, checks while it runs, its results.

A stage calls `start_run`, `find_checkpoint`, `log_facts`, `train` and `finish_run`; the callbacks here do the rest.
"""

import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from loguru import logger
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ExportableState, PrinterCallback
from transformers.utils import logging as transformers_logging

from errors import UserError

if TYPE_CHECKING:
    from model_loading import Lineage

BEST = "checkpoint-best"
# What a line of the log shows of an evaluation.
EVALUATED = (
    *("loss", "perplexity", "token_accuracy", "bits_per_byte"),
    *("accuracy", "margin", "accuracy_rejected_longer", "accuracy_rejected_shorter", "longer_wins"),
    *("reward_accuracy", "reward_margin", "chosen_logps", "rejected_logps", "samples_ended", "sample_repetition"),
)
LOG_FORMAT = "<green>{time:YYYY-MM-DD HH:mm:ss}</green> | <level>{level: <7}</level> | {message}"


# ---------------------------------------------------------------- start


def start_log(is_main: bool = True) -> None:
    """Log lines to standard error, from one process only; the libraries' bars only where somebody looks."""
    logger.remove()
    if is_main:
        logger.add(sys.stderr, format=LOG_FORMAT, colorize=sys.stderr.isatty())
    if not is_main or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def start_run(stage: str, training_args: TrainingArguments, notes: list[str]) -> None:
    """Set up the log (main process only) and the seeds, and say what runs on what.

    Args:
        notes: what the parser did otherwise than the command says.
    """
    import datasets

    is_main = training_args.process_index == 0
    start_log(is_main)
    # Libraries' own warnings, once and not once a process.
    (transformers_logging.set_verbosity_warning if is_main else transformers_logging.set_verbosity_error)()
    if training_args.disable_tqdm or not is_main:
        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()
    # transformers 5.24, TRL 1.16 and PEFT 0.21 still call each other by names that transformers renamed.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)
    set_seed(training_args.seed)
    logger.info(f"{stage}: {training_args.world_size} process(es) on {_device_name(training_args)}")
    for line in [*notes, *_version_notes()]:
        logger.info(line)


def _device_name(training_args: TrainingArguments) -> str:
    if training_args.use_cpu:
        return f"the CPU ({os.cpu_count()} cores)"
    properties = torch.cuda.get_device_properties(training_args.device)
    return f"{torch.cuda.device_count()} x {properties.name} ({properties.total_memory / 2**30:.0f} GiB)"


def _version_notes() -> list[str]:
    """The versions found, and those that differ from the ones this repository was tested with."""
    requirements = Path(__file__).with_name("requirements.txt").read_text(encoding="utf-8")
    tested = dict(re.findall(r"^([\w-]+)==([\w.]+)", requirements, flags=re.MULTILINE))
    found, other = [f"python {platform.python_version()}"], []
    for package, tested_version in tested.items():
        try:
            found_version = version(package)
        except PackageNotFoundError:
            found_version = "none"
        if package in ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes"):
            found.append(f"{package} {found_version}")
        if found_version.partition("+")[0] != tested_version:  # torch 2.13.0+cu130 is torch 2.13.0
            other.append(f"{package} {found_version} (tested: {tested_version})")
    notes = [", ".join(found)]
    if other:
        notes.append(f"not the tested versions: {', '.join(other)}; `bash setup.sh` installs those")
    return notes


# ---------------------------------------------------------------- where the run starts


def find_checkpoint(training_args: TrainingArguments, overwrite_output_dir: bool) -> str | None:
    """The checkpoint to resume from, None for a new run; a folder with an earlier run is never written over.

    `--resume_from_checkpoint True` takes the newest complete checkpoint, a path that one. Otherwise an output folder
    that holds a run is refused, or with `--overwrite_output_dir` moved beside the new one.
    """
    output_dir = Path(training_args.output_dir)
    wanted = training_args.resume_from_checkpoint
    if wanted and overwrite_output_dir and _numbered_checkpoints(output_dir):
        logger.info(
            "--overwrite_output_dir: nothing is overwritten, because --resume_from_checkpoint goes on with the run"
        )
    if isinstance(wanted, str):
        missing = _missing_files(Path(wanted))
        if missing:
            raise UserError(f"--resume_from_checkpoint {wanted}: {missing}; take another checkpoint of the run")
        _refuse_other_settings(Path(wanted), _optimizer_settings(training_args))
        return wanted
    if wanted:
        for checkpoint in _numbered_checkpoints(output_dir):
            missing = _missing_files(checkpoint)
            if not missing:
                _refuse_other_settings(checkpoint, _optimizer_settings(training_args))
                logger.info(f"resuming from {checkpoint}")
                return str(checkpoint)
            logger.warning(f"{checkpoint} is not complete ({missing}) and is passed over")
        logger.info(f"--resume_from_checkpoint True: no checkpoint in {output_dir} yet, so the run starts anew")
    # One process moves the folder; the others look when it is done.
    with training_args.main_process_first(local=False, desc="the output folder"):
        held = [name for name in ("train_results.json", "trainer_state.json", BEST) if (output_dir / name).exists()]
        held += [checkpoint.name for checkpoint in _numbered_checkpoints(output_dir)]
        if not held or training_args.process_index != 0:
            return None
        if not overwrite_output_dir:
            raise UserError(
                f"--output_dir {output_dir} holds a run already ({', '.join(held)}): --resume_from_checkpoint True "
                "goes on with it, --overwrite_output_dir True starts again and keeps it beside, or name another folder"
            )
        number = 1
        while (aside := output_dir.with_name(f"{output_dir.name}.earlier-{number}")).exists():
            number += 1
        output_dir.rename(aside)
        logger.info(f"--overwrite_output_dir: the earlier run in {output_dir} is now {aside}")
    return None


def _numbered_checkpoints(output_dir: Path) -> list[Path]:
    """checkpoint-N folders, the newest first."""
    if not output_dir.is_dir():
        return []
    numbered = [path for path in output_dir.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]
    return sorted(numbered, key=lambda path: int(path.name.partition("-")[2]), reverse=True)


def _missing_files(checkpoint: Path) -> str:
    """What a checkpoint lacks for an exact resume, "" where it is complete.

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
    return f"without {', '.join(missing)}" if missing else ""


def _optimizer_settings(training_args: TrainingArguments) -> dict[str, float | str]:
    """The flags whose values a resumed optimizer brings with it, so that new ones would have no effect."""
    names = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
    return {f"--{name}": getattr(training_args, name) for name in names} | {"--optim": str(training_args.optim.value)}


def _data_settings(trainer: Trainer) -> dict[str, int]:
    """What tells other training data from those the run was started with: a resume skips what it has seen of them."""
    if _is_streamed(trainer):
        return {}
    return {
        "rows of training data": len(trainer.train_dataset),
        "training tokens": sum(trainer.train_dataset["length"]),
    }


def _refuse_other_settings(checkpoint: Path, wanted: dict[str, float | int | str]) -> None:
    """Compare with what `CheckpointKeeper` recorded; a checkpoint without a record (another tool's) passes."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    recorded = state.get("stateful_callbacks", {}).get("CheckpointKeeper", {}).get("attributes", {})
    for name, value in wanted.items():
        if recorded.get(name, value) != value:
            raise UserError(
                f"{name} {value}: the run in {checkpoint.parent} was started with {recorded[name]}, and a resumed run "
                "goes on with that; leave it as it was, start again (--resume_from_checkpoint False "
                "--overwrite_output_dir True), or name another --output_dir"
            )


# ---------------------------------------------------------------- before the first step


def log_facts(trainer: Trainer, facts: dict[str, str]) -> None:
    """The block of facts: the stage's own, then steps and batch arithmetic."""
    args = trainer.args
    per_step, steps_per_epoch, steps = _steps(trainer)
    if _is_streamed(trainer):
        data = "streamed: --max_steps"
    else:
        rows = len(trainer.train_dataset)
        data = f"{rows} rows, {steps_per_epoch} steps an epoch, {steps / steps_per_epoch:.3g} epochs"
    facts = facts | {
        "batch": f"{args.train_batch_size} a device x {args.gradient_accumulation_steps} accumulated x "
        f"{args.world_size} process(es) = {per_step} rows a step",
        "steps": f"{steps} ({data})",
        "precision": "bfloat16 autocast" if args.bf16 else "float16 autocast" if args.fp16 else "float32",
        "gradient checkpointing": "on" if args.gradient_checkpointing else "off",
        "output": str(args.output_dir),
    }
    width = max(map(len, facts))
    for name, value in facts.items():
        logger.info(f"  {name:<{width}}  {value}")


def _is_streamed(trainer: Trainer) -> bool:
    """Whether nobody knows how many rows there are."""
    return isinstance(trainer.train_dataset, torch.utils.data.IterableDataset)


def _steps(trainer: Trainer) -> tuple[int, int, int]:
    """Rows a step, steps an epoch, steps of the run, as Trainer counts them; a streamed run is one epoch."""
    args = trainer.args
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if _is_streamed(trainer):
        return per_step, args.max_steps, args.max_steps
    steps_per_epoch = max(math.ceil(len(trainer.train_dataset) / per_step), 1)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    return per_step, steps_per_epoch, steps


def is_finished(trainer: Trainer, checkpoint: str | None) -> bool:
    """Whether the run to resume has ended with its results written; says so, since nothing would be trained.

    Its results stay as they are: resuming would write over them, and train one step too many within an epoch.
    Raises UserError where the training data are not those that the run was started with.
    """
    if checkpoint is None:
        return False
    _refuse_other_settings(Path(checkpoint), _data_settings(trainer))
    output_dir = Path(trainer.args.output_dir)
    if not (output_dir / "loss.png").is_file():
        return False
    state = json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))
    if state["global_step"] < _steps(trainer)[2]:
        return False
    logger.warning(
        f"{output_dir} holds a finished run ({state['global_step']} steps): nothing is trained. To train it "
        "again: --resume_from_checkpoint False --overwrite_output_dir True, or another --output_dir"
    )
    leave_process_group()
    return True


# ---------------------------------------------------------------- while it runs


class ProgressLines(TrainerCallback):
    """One line for every log, readable with `tail -f`; after ten steps it says the time left."""

    def __init__(self):
        self.start: tuple[float, int] | None = None
        self.said_time_left = False

    def on_step_end(self, args, state, control, **kwargs):
        # The first step also warms up kernels and takes the longest batch: the clock starts behind it.
        if self.start is None:
            self.start = (time.monotonic(), state.global_step)
        elif not self.said_time_left and state.global_step - self.start[1] == 10 and state.is_world_process_zero:
            self.said_time_left = True
            logger.info(f"about {self._time_left(state)} left, at the speed of the first ten steps")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or not state.is_world_process_zero:
            return
        if "loss" in logs:
            line = f"step {state.global_step}/{state.max_steps}  epoch {state.epoch:.2f}  loss {logs['loss']:.4f}"
            line += f"  lr {logs.get('learning_rate', 0):.2e}"
            if "grad_norm" in logs:
                line += f"  grad norm {logs['grad_norm']:.3f}"
            if "tokens_per_second" in logs:
                line += f"  {logs['tokens_per_second']:.0f} tokens/s"
            line += f"  peak {_peak_memory_gib():.1f} GiB"
            if self.said_time_left:
                line += f"  {self._time_left(state)} left"
            logger.info(line)
        elif "eval_loss" in logs:
            rest = {key.removeprefix("eval_"): value for key, value in logs.items() if isinstance(value, float)}
            shown = [f"{key} {rest[key]:.4f}" for key in EVALUATED if key in rest]
            logger.info(f"step {state.global_step}/{state.max_steps}  evaluation: {'  '.join(shown)}")

    def _time_left(self, state) -> str:
        seconds_per_step = (time.monotonic() - self.start[0]) / max(state.global_step - self.start[1], 1)
        return _duration(seconds_per_step * (state.max_steps - state.global_step))


class QuietProgressBar(ProgressCallback):
    """transformers' bar for a terminal, without the dictionaries it prints: ProgressLines says them."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass


class AdapterMovementCheck(TrainerCallback):
    """After the first step with a real learning rate every LoRA matrix that should have moved has moved.

    Dead gradients (checkpointing without input gradients, a wrapped module) otherwise train nothing, silently.
    A of a new adapter stays: with B = 0 its gradient is 0, and under a score head of zeros so is every gradient.
    """

    def __init__(self):
        self.before: dict[str, torch.Tensor] | None = None
        self.done = False

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        # Warm-up starts at 0, and a resumed run may be near the end of its schedule.
        rate = optimizer.param_groups[0]["lr"] if optimizer is not None else 0.0
        if not self.done and rate >= 0.01 * args.learning_rate > 0 and not self._is_under_zeros(model):
            self.before = {name: weights.clone() for name, weights in self._adapter_weights(model)}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.before is None:
            return
        before, self.before = self.before, None
        stuck = []
        for name, weights in self._adapter_weights(model):
            partner = before.get(name.replace(".lora_A.", ".lora_B."))
            should_move = ".lora_A." not in name or (partner is not None and bool(partner.any()))
            if should_move and torch.equal(before[name], weights):
                stuck.append(name)
        if args.fp16 and len(stuck) == len(before):
            return  # the loss scaler skips its first steps until the scale fits
        self.done = True
        if stuck:
            raise UserError(
                f"step {state.global_step}: {len(stuck)} of {len(before)} adapter matrices did not move: "
                f"{', '.join(stuck[:4])}{', ...' if len(stuck) > 4 else ''}; they get no gradient. Without "
                "--gradient_checkpointing, or with other --target_modules, they may"
            )

    @classmethod
    def _is_under_zeros(cls, model) -> bool:
        """Whether the model ends in a score head that is still all zeros."""
        return any(not weights.any() for _, weights in cls._trained_weights(model, ".score."))

    @classmethod
    def _adapter_weights(cls, model) -> Iterator[tuple[str, torch.Tensor]]:
        return cls._trained_weights(model, ".lora_")

    @staticmethod
    def _trained_weights(model, part_of_name: str) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and part_of_name in name:
                # ZeRO-3 leaves an empty parameter and this process's part of it.
                yield name, getattr(parameter, "ds_tensor", parameter).detach()


class CheckpointKeeper(TrainerCallback, ExportableState):
    """Keeps `checkpoint-best` by the evaluation loss; records in every checkpoint lineage and settings of the run."""

    def __init__(self, trainer: Trainer, lineage: "Lineage"):
        self.trainer = trainer
        self.lineage = lineage
        self.best_loss = math.inf
        self.best_step: int | None = None

    def state(self) -> dict:
        """What transformers writes into trainer_state.json for this callback."""
        settings = _optimizer_settings(self.trainer.args) | _data_settings(self.trainer)
        return {"args": {}, "attributes": settings}

    def on_train_begin(self, args, state, control, **kwargs):
        if state.best_metric is not None and Path(args.output_dir, BEST).is_dir():
            self.best_loss, self.best_step = state.best_metric, state.best_global_step

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if metrics["eval_loss"] < self.best_loss:
            self.best_loss, self.best_step = metrics["eval_loss"], state.global_step
            self.save_best()

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.lineage.save(Path(args.output_dir, f"checkpoint-{state.global_step}"))

    def save_best(self) -> None:
        """Write the model beside the old best and rename it, so that a whole one is there at any moment."""
        best = Path(self.trainer.args.output_dir, BEST)
        partial = best.with_name(f".{BEST}.partial")
        self.trainer.save_model(str(partial))
        if not self.trainer.args.should_save:
            return
        self.lineage.save(partial)
        (partial / "training_args.bin").unlink(missing_ok=True)
        old = best.with_name(f".{BEST}.old")
        if best.exists():
            best.rename(old)
        partial.rename(best)
        shutil.rmtree(old, ignore_errors=True)


class StopSignals(TrainerCallback):
    """SIGTERM and SIGINT: finish the step, save a checkpoint, stop; a second signal kills at once.

    Every process asks the others at the end of a step, since the signal reaches them at different steps.
    """

    def __init__(self):
        self.received: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.previous = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        self.received = number
        logger.warning(f"{signal.Signals(number).name}: a checkpoint is saved after this step; again to stop at once")

    def on_step_end(self, args, state, control, **kwargs):
        received = self.received or 0
        if args.world_size > 1:
            shared = torch.tensor(received, device=args.device)
            torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
            received = int(shared)
        if received:
            self.received = received
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False


def train(
    trainer: Trainer, lineage: "Lineage", checkpoint: str | None, logging_dir: str | None = None
) -> CheckpointKeeper:
    """Train with the callbacks of this module and write `train_results.json`.

    Args:
        lineage: recorded in every checkpoint.
        checkpoint: what `find_checkpoint` returned.
        logging_dir: of TensorBoard's events; None for runs/ in the output folder.

    Exits with 128 + signal number when a signal stopped the run after its checkpoint was saved.
    """
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
    keeper, signals = CheckpointKeeper(trainer, lineage), StopSignals()
    for callback in (ProgressLines(), AdapterMovementCheck(), keeper, signals):
        trainer.add_callback(callback)
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(_out_of_memory_advice(trainer.args)) from error
    if signals.received:
        name = signal.Signals(signals.received).name
        logger.warning(
            f"{name}: stopped at step {trainer.state.global_step}/{trainer.state.max_steps}, saved in "
            f"{trainer.args.output_dir}/checkpoint-{trainer.state.global_step}; the same command with "
            "--resume_from_checkpoint True goes on"
        )
        leave_process_group()
        sys.exit(128 + signals.received)
    trainer.save_metrics("train", result.metrics, combined=False)
    trainer.save_state()
    return keeper


def _out_of_memory_advice(args: TrainingArguments) -> str:
    batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    remedies = []
    if batch > 1:
        longer = math.ceil(accumulation * batch / (batch // 2))
        remedies.append(f"--per_device_train_batch_size {batch // 2} --gradient_accumulation_steps {longer}")
    if not args.gradient_checkpointing:
        remedies.append("--gradient_checkpointing True")
    remedies += [
        "--load_in_4bit True",
        "a shorter --model_max_length (--block_size, --max_source_length)",
        "a smaller --lora_rank",
    ]
    return f"out of GPU memory; in this order: {'; '.join(remedies)}"


# ---------------------------------------------------------------- results


def finish_run(trainer: Trainer, keeper: CheckpointKeeper | None, next_command: str) -> dict[str, float]:
    """Evaluate, make sure of `checkpoint-best`, write results and curves, and name the next command.

    `eval_results.json` describes the model in `checkpoint-best`. Returns its metrics ({} without evaluation data).
    """
    output_dir = Path(trainer.args.output_dir)
    metrics: dict[str, float] = {}
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
        shown = [f"eval_{name}" for name in EVALUATED if f"eval_{name}" in metrics]
        logger.info("evaluation: " + "  ".join(f"{name} {metrics[name]:.4f}" for name in shown))
    logger.info(f"results: {output_dir}; curves: tensorboard --logdir {output_dir}")
    logger.info(f"next: {next_command}")
    return metrics


def _last_evaluation(trainer: Trainer, keeper: CheckpointKeeper | None) -> dict[str, float]:
    """Metrics of checkpoint-best: from the log if it was evaluated on the way, otherwise measured now."""
    evaluated = {entry["step"]: entry for entry in trainer.state.log_history if "eval_loss" in entry}
    if keeper is None or trainer.state.global_step not in evaluated:
        latest = trainer.evaluate()
        if keeper is None or keeper.best_step == trainer.state.global_step:
            return latest
    return evaluated[keeper.best_step]


def plot_curves(log_history: list[dict], file: Path) -> None:
    """Training and evaluation loss over steps as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o-")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="step", ylabel="loss (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


# ---------------------------------------------------------------- small things


def leave_process_group() -> None:
    """Wait for the other processes and close the connections: gloo's threads abort a process that just exits."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _peak_memory_gib() -> float:
    """Peak memory of this process: of its GPU, or of the process itself on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
