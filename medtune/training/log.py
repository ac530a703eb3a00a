"""The log of a run: versions and device, facts, a line for each log step, and curves."""

import os
import platform
import re
import resource
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from loguru import logger
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from medtune.training.precision import describe_precision
from medtune.training.steps import count_steps, is_streamed

# What a line of the log shows of an evaluation.
EVALUATED = (
    *("loss", "perplexity", "token_accuracy", "bits_per_byte"),
    *("accuracy", "margin", "accuracy_rejected_longer", "accuracy_rejected_shorter", "longer_wins"),
    *("reward_accuracy", "reward_margin", "chosen_logps", "rejected_logps", "samples_ended", "sample_repetition"),
)
LOG_FORMAT = "<green>{time:YYYY-MM-DD HH:mm:ss}</green> | <level>{level: <7}</level> | {message}"


def start_log(is_main: bool = True) -> None:
    """Log to standard error from one process only; the libraries' progress bars only on a terminal."""
    logger.remove()
    if is_main:
        logger.add(sys.stderr, format=LOG_FORMAT, colorize=sys.stderr.isatty())
    if not is_main or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def device_name(training_args: TrainingArguments) -> str:
    if training_args.use_cpu:
        return f"the CPU ({os.cpu_count()} cores)"
    properties = torch.cuda.get_device_properties(training_args.device)
    return f"{torch.cuda.device_count()} x {properties.name} ({properties.total_memory / 2**30:.0f} GiB)"


def version_notes() -> list[str]:
    """The installed versions, and those that differ from the ones this repository was tested with."""
    requirements = Path(__file__).parents[2].joinpath("requirements.txt").read_text(encoding="utf-8")
    tested = dict(re.findall(r"^([\w-]+)==([\w.]+)", requirements, flags=re.MULTILINE))
    installed, untested = [f"python {platform.python_version()}"], []
    for package, tested_version in tested.items():
        try:
            found_version = version(package)
        except PackageNotFoundError:
            found_version = "none"
        if package in ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes"):
            installed.append(f"{package} {found_version}")
        if found_version.partition("+")[0] != tested_version:  # torch 2.13.0+cu130 is torch 2.13.0
            untested.append(f"{package} {found_version} (tested: {tested_version})")
    notes = [", ".join(installed)]
    if untested:
        notes.append(f"not the tested versions: {', '.join(untested)}; `bash setup.sh` installs those")
    return notes


def log_facts(trainer: Trainer, facts: dict[str, str]) -> None:
    """The block of facts: the stage's own, then steps and batch arithmetic."""
    args = trainer.args
    per_step, steps_per_epoch, steps = count_steps(args, trainer.train_dataset)
    if is_streamed(trainer.train_dataset):
        data = "streamed: --max_steps"
    else:
        rows = len(trainer.train_dataset)
        data = f"{rows} rows, {steps_per_epoch} steps an epoch, {steps / steps_per_epoch:.3g} epochs"
    facts = facts | {
        "batch": f"{args.train_batch_size} a device x {args.gradient_accumulation_steps} accumulated x "
        f"{args.world_size} process(es) = {per_step} rows a step",
        "steps": f"{steps} ({data})",
        "precision": describe_precision(args, trainer.model),
        "gradient checkpointing": "on" if args.gradient_checkpointing else "off",
        "output": str(args.output_dir),
    }
    log_block(facts)


def log_block(facts: dict[str, str]) -> None:
    width = max(map(len, facts))
    for name, value in facts.items():
        logger.info(f"  {name:<{width}}  {value}")


class ProgressLines(TrainerCallback):
    """Logs one line at each log step, for `tail -f`; after ten steps with the time left."""

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
            line = f"step {state.global_step}/{state.max_steps}  epoch {state.epoch:.2f}  loss {logs['loss']:z.4f}"
            line += f"  lr {logs.get('learning_rate', 0):.2e}"
            if "grad_norm" in logs:
                line += f"  grad norm {logs['grad_norm']:.3f}"
            if "tokens_per_second" in logs:
                line += f"  {logs['tokens_per_second']:.0f} tokens/s"
            line += f"  peak {peak_memory_gib():.1f} GiB"
            if self.said_time_left:
                line += f"  {self._time_left(state)} left"
            logger.info(line)
        elif "eval_loss" in logs:
            rest = {key.removeprefix("eval_"): value for key, value in logs.items() if isinstance(value, float)}
            figures = [f"{key} {rest[key]:z.4f}" for key in EVALUATED if key in rest]
            logger.info(f"step {state.global_step}/{state.max_steps}  evaluation: {'  '.join(figures)}")

    def _time_left(self, state) -> str:
        seconds_per_step = (time.monotonic() - self.start[0]) / max(state.global_step - self.start[1], 1)
        return duration(seconds_per_step * (state.max_steps - state.global_step))


class QuietProgressBar(ProgressCallback):
    """transformers' progress bar without its printed dictionaries, which ProgressLines logs instead."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass


# Of a panel by the label of its y-axis: the figures of the log in it, and what the legend calls them.
LOSS_PANEL = {"loss (nats)": {"loss": "training", "eval_loss": "evaluation"}}


def plot_curves(
    log_history: list[dict], file: Path, panels: dict[str, dict[str, str]] = LOSS_PANEL, xlabel: str = "step"
) -> None:
    """Plot figures of the log over steps as a PNG; evaluations have dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(
        1, len(panels), figsize=(2 + 6 * len(panels), 4.5), layout="constrained", squeeze=False
    )
    for axes, (ylabel, figures) in zip(rows[0], panels.items(), strict=True):
        for key, label in figures.items():
            points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
            if points:
                style = "o-" if key.startswith("eval_") else "-"
                axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.grid(alpha=0.3)
        if axes.lines:  # a run shorter than --logging_steps has none
            axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def peak_memory_gib() -> float:
    """Peak memory of this process: of its GPU, or of the process itself on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def memory_figures() -> dict[str, float]:
    """For a run's results: its peak of memory, and beside it the estimate that the launcher printed."""
    figures = {"peak_memory_gib": round(peak_memory_gib(), 3)}
    estimated = os.environ.get("ESTIMATED_GIB")
    return figures | ({"estimated_memory_gib": float(estimated)} if estimated else {})


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
