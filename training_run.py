"""What surrounds training in every stage: the log, checks before and while it runs, its checkpoints and results.

A stage calls `start_run`, `log_facts`, `train` and `finish_run`; the callbacks here do the rest.
"""

import errno
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
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NoReturn

import torch
from accelerate.utils.memory import should_reduce_batch_size
from loguru import logger
from safetensors import SafetensorError
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ExportableState, PrinterCallback
from transformers.utils import logging as transformers_logging

from checkpoints import (
    BEST,
    UNFINISHED,
    delete_oldest,
    follow_schedule,
    mount_point,
    n_bytes,
    no_other_run,
    numbered_checkpoints,
    optimizer_bytes,
    put_in_place,
    read_state,
    recorded_attributes,
    refuse_other_settings,
    refuse_small_disk,
    run_settings,
    write_manifest,
)
from errors import UserError, end_at_next_signal

if TYPE_CHECKING:
    from model_loading import Lineage

# A loss has exploded that is four times the median of so many steps and three nats above it, for where pairs are told
# apart with a median near 0 a single one that is not costs more than two; and that is twice the largest of these steps,
# for batches of like length can be hard several times in a row.
RECENT_STEPS = 50
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
    if training_args.deepspeed and training_args.use_cpu:
        _start_deepspeed_on_the_cpu()
    logger.info(f"{stage}: {training_args.world_size} process(es) on {_device_name(training_args)}")
    for line in [*notes, *_version_notes()]:
        logger.info(line)


def _start_deepspeed_on_the_cpu() -> None:
    """What accelerate 1.15 does on GPUs only; without it ZeRO-3 takes this process for the only one."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for a minute
    deepspeed.init_distributed(dist_backend="gloo")


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


def _data_settings(trainer: Trainer) -> dict[str, int]:
    """What tells other training data from those the run was started with: a resume skips what it has seen of them."""
    if _is_streamed(trainer):
        return {}
    return {
        "rows of training data": len(trainer.train_dataset),
        "training tokens": sum(trainer.train_dataset["length"]),
    }


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
    args, (_, steps_per_epoch, steps) = trainer.args, _steps(trainer)
    every = {"no": math.inf, "epoch": steps_per_epoch, "best": args.eval_steps or steps_per_epoch}
    interval = every.get(args.save_strategy.value, args.save_steps)
    if interval < 1:
        interval = math.ceil(interval * steps)
    return math.ceil(steps / interval)


def is_finished(trainer: Trainer, lineage: "Lineage", checkpoint: str | None) -> bool:
    """Whether the run to resume has ended with its results written; says so, since nothing would be trained.

    Its results stay as they are: resuming would write over them, and train one step too many within an epoch.
    Raises UserError where the run was started with other training data or from other weights, or is finished with
    other flags.
    """
    if checkpoint is None:
        return False
    refuse_other_settings(Path(checkpoint), _data_settings(trainer))
    output_dir = Path(trainer.args.output_dir)
    state = read_state(checkpoint)
    finished = state["global_step"] >= _steps(trainer)[2] and (output_dir / "loss.png").is_file()
    lineage.refuse_other_run(checkpoint, finished)
    if not finished:
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
            line += f"  peak {peak_memory_gib():.1f} GiB"
            if self.said_time_left:
                line += f"  {self._time_left(state)} left"
            logger.info(line)
        elif "eval_loss" in logs:
            rest = {key.removeprefix("eval_"): value for key, value in logs.items() if isinstance(value, float)}
            shown = [f"{key} {rest[key]:.4f}" for key in EVALUATED if key in rest]
            logger.info(f"step {state.global_step}/{state.max_steps}  evaluation: {'  '.join(shown)}")

    def _time_left(self, state) -> str:
        seconds_per_step = (time.monotonic() - self.start[0]) / max(state.global_step - self.start[1], 1)
        return duration(seconds_per_step * (state.max_steps - state.global_step))


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
    """Makes whole checkpoints of what Trainer writes, and keeps `checkpoint-best` by the evaluation loss.

    Every checkpoint records lineage, settings of the run, and the best evaluation so far.
    """

    def __init__(self, trainer: Trainer, lineage: "Lineage", stop: "StopSignals"):
        self.trainer = trainer
        self.lineage = lineage
        self.stop = stop
        self.best_loss: float | None = None
        self.best_step: int | None = None
        # The folder that Trainer, which writes file by file into the final place, is given as that of the run.
        trainer._get_output_dir = lambda trial: str(Path(trainer.args.output_dir, UNFINISHED))
        # Trainer asks for `state` before it has set them.
        trainer._tr_loss, trainer._globalstep_last_logged = torch.tensor(0.0), 0

    def state(self) -> dict:
        """What transformers writes into trainer_state.json for this callback."""
        settings = run_settings(self.trainer.args) | _data_settings(self.trainer)
        progress = {
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "evaluation_is_due": self.stop.evaluation_is_due,
            "n_longest_first": getattr(self.trainer, "n_longest_first", None) or _rows_of_a_batch(self.trainer.args),
            # The losses since the last line of the log, which the next line is the mean of: `on_save` has them of all.
            "loss_sum": 0.0,
            "logged_step": self.trainer._globalstep_last_logged,
        }
        return {"args": {}, "attributes": settings | progress}

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        recorded = recorded_attributes(state.stateful_callbacks)
        goes_on = 0 < state.global_step < state.max_steps
        if goes_on and (jump := follow_schedule(lr_scheduler, state.global_step, Path(args.output_dir))):
            logger.warning(jump)
        if Path(args.output_dir, BEST).is_dir():
            self.best_loss, self.best_step = recorded.get("best_loss"), recorded.get("best_step")
        self.trainer._tr_loss += recorded.get("loss_sum", 0.0)
        self.trainer._globalstep_last_logged = recorded.get("logged_step", state.global_step)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        loss = metrics["eval_loss"]
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_loss, self.best_step = loss, state.global_step
            self.save_best()

    def on_save(self, args, state, control, **kwargs):
        """Trainer has written all files of the checkpoint, in each process its own."""
        place = Path(args.output_dir, f"checkpoint-{state.global_step}")
        # checkpoint-best is ours; with one of its own, Trainer deletes the newest checkpoint at the end for it.
        state.best_model_checkpoint = None
        loss_sum = _mean(self.trainer._tr_loss, args)  # waits for all processes
        if args.should_save:
            recorded_attributes(state.stateful_callbacks)["loss_sum"] = loss_sum
            partial = place.parent / UNFINISHED / place.name
            self.lineage.save(partial)
            state.save_to_json(str(partial / "trainer_state.json"))
            write_manifest(partial)
            put_in_place(place)
            delete_oldest(Path(args.output_dir), args.save_total_limit)
        _wait_for_all()

    def save_best(self) -> None:
        best = Path(self.trainer.args.output_dir, BEST)
        self.trainer.save_model(str(best.parent / UNFINISHED / BEST))
        if self.trainer.args.should_save:
            partial = best.parent / UNFINISHED / BEST
            self.lineage.save(partial)
            (partial / "training_args.bin").unlink(missing_ok=True)
            put_in_place(best)
        _wait_for_all()


class StoppedInEvaluationError(Exception):
    """A signal came during an evaluation, which is given up."""


class NothingLeftError(Exception):
    """The checkpoint that a run resumes from is its last step."""


class StopSignals(TrainerCallback):
    """SIGTERM, SIGINT and a lost terminal's SIGHUP: save the last whole step and stop; a second one kills at once.

    Nobody waits for a step of many micro-batches or a long evaluation: both are given up, and done again by the
    resumed run with the random numbers they began with. Every process asks the others, since the signal reaches
    them at different moments.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.received: int | None = None
        self.previous: dict[int, object] = {}
        self.loss_sum = torch.tensor(0.0)
        self.random_state: list[torch.Tensor] = []
        self.is_training = False
        self.evaluation_is_due = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.is_training = True
        self._keep_random_state()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            ignored = number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN  # nohup
            if number not in self.previous and not ignored:
                self.previous[number] = signal.signal(number, self._receive)

    def on_train_end(self, args, state, control, **kwargs):
        self.is_training = False
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        end_at_next_signal(number)
        self.received = number
        logger.warning(f"{signal.Signals(number).name}: saving a checkpoint and stopping; again to stop at once")

    def _any_received(self, args) -> bool:
        self.received = _largest(self.received or 0, args) or None
        return self.received is not None

    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            raise NothingLeftError  # transformers 5.24 would train one more step where the last epoch is not whole

    def on_step_begin(self, args, state, control, **kwargs):
        self.loss_sum = self.trainer._tr_loss.clone()

    def on_substep_end(self, args, state, control, **kwargs):
        # DeepSpeed keeps the sums of a step's gradients and counts its micro-batches in the checkpoint.
        if not args.deepspeed and self._any_received(args):
            control.should_training_stop = True
            self.trainer._tr_loss.copy_(self.loss_sum)
            self._restore_random_state()

    def on_step_end(self, args, state, control, **kwargs):
        self._keep_random_state()
        self.evaluation_is_due = False
        if self._any_received(args):
            control.should_save = control.should_training_stop = True
            self.evaluation_is_due = control.should_evaluate
            control.should_evaluate = False

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.received:
            control.should_log = control.should_evaluate = False
            is_saved = Path(args.output_dir, f"checkpoint-{state.global_step}").is_dir()
            control.should_save = state.global_step > 0 and not is_saved

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.is_training and self._any_received(args):
            self.evaluation_is_due = True
            self._restore_random_state()
            raise StoppedInEvaluationError

    def on_evaluate(self, args, state, control, **kwargs):
        # An evaluation draws random numbers too (its DataLoader does): training goes on as if it had not.
        if self.is_training:
            self._restore_random_state()

    def _keep_random_state(self) -> None:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        self.random_state = [torch.get_rng_state(), *cuda]

    def _restore_random_state(self) -> None:
        torch.set_rng_state(self.random_state[0])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(self.random_state[1:])


class BadSteps(TrainerCallback):
    """Leaves out a step whose loss or gradient is not finite, and stops after several bad ones in a row.

    A loss that explodes is bad too, but its step is done: clipped gradients bring many a run back.
    """

    def __init__(self, trainer: Trainer, most: int, movement_check: AdapterMovementCheck):
        self.trainer = trainer
        self.most = most
        self.movement_check = movement_check
        self.in_a_row = 0
        self.recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self.micro_batches: list[tuple[torch.Tensor, list[str]]] = []
        trainer.training_step = self._watched(trainer.training_step)

    def _watched(self, training_step: Callable) -> Callable:
        def watched(model, inputs: dict, *args, **kwargs) -> torch.Tensor:
            sources = inputs["sources"]
            loss = training_step(model, inputs, *args, **kwargs)
            self.micro_batches.append((loss, sources))
            return loss

        return watched

    def on_step_begin(self, args, state, control, **kwargs):
        self.micro_batches.clear()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        losses = torch.stack([loss.float() for loss, _ in self.micro_batches])
        loss = losses.sum().item()
        usual = abs(median(self.recent)) if len(self.recent) >= RECENT_STEPS // 2 else math.inf
        limit = max(4 * usual, usual + 3, 2 * max(self.recent, default=0.0))
        # fp16's loss scaler sees to gradients itself, and DeepSpeed has used them.
        gradients = [] if args.fp16 or args.deepspeed else [p.grad for p in model.parameters() if p.grad is not None]
        if not math.isfinite(loss):
            fault, what = 3, f"the loss is {loss}"
        elif gradients and not torch.isfinite(norm := torch.nn.utils.get_total_norm(gradients)):
            fault, what = 2, f"the gradient is {norm.item()}, the loss {loss:.4f}"
        elif loss > limit:
            fault, what = 1, f"the loss is {loss:.4f} after a median of {median(self.recent):.4f}"
        else:
            fault, what = 0, "another process has a bad batch"
        worst = _largest(fault, args)
        if worst == 0:
            self.in_a_row = 0
            self.recent.append(loss)
            return
        self.in_a_row += 1
        line = f"step {state.global_step + 1}: {what} at learning rate {self.trainer._get_learning_rate():.2e}"
        line += f" on {self._records(losses, fault)}"
        is_left_out = worst > 1 and not args.deepspeed
        if self.in_a_row >= self.most or (worst > 1 and args.deepspeed):
            raise UserError(
                f"{line}; {self.in_a_row} bad step(s) in a row (--max_bad_steps {self.most}): look at these records, "
                "and if they are sound lower --learning_rate or raise --warmup_ratio"
            )
        if worst == 1 and self.in_a_row == 1:  # rare records do that too; it is nothing to be alarmed by yet
            logger.info(f"{line}; a hard batch, unless the next steps are as bad")
        else:
            logger.warning(f"{line}; bad step {self.in_a_row} in a row" + (", left out" if is_left_out else ""))
        if is_left_out and not args.fp16:
            for parameter in model.parameters():
                parameter.grad = None
            self.movement_check.before = None

    def _records(self, losses: torch.Tensor, fault: int) -> str:
        """`file:line` of the micro-batches that are not finite, otherwise of the one with the largest loss."""
        bad = [index for index, loss in enumerate(losses.tolist()) if not math.isfinite(loss)]
        names = [name for index in bad or [int(losses.argmax())] for name in self.micro_batches[index][1]]
        if torch.distributed.is_initialized():
            gathered: list[list[str]] = [[]] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(gathered, names if fault else [])
            names = [name for of_process in gathered for name in of_process]
        return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def keep_rows_per_step(trainer: Trainer) -> None:
    """For `--auto_find_batch_size`: where the batch shrinks, accumulate more, so that a step has as many rows."""
    args, update = trainer.args, trainer._update_auto_batch_size
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    tried: list[int] = []

    def update_both(batch_size: int) -> None:
        batch = max(size for size in range(1, batch_size + 1) if rows % size == 0)
        if tried and trainer.state.global_step > trainer._initial_global_step:
            # transformers 5.24 would begin again at the first step, with weights that were trained since.
            raise UserError(_out_of_memory_advice(trainer))
        if batch in tried:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried before.")  # accelerate goes on to the next size
        if tried:
            logger.warning(
                f"out of memory with --per_device_train_batch_size {tried[-1]}: going on with {batch}, and "
                f"--gradient_accumulation_steps {rows // batch} keeps the rows of a step"
            )
        tried.append(batch)
        update(batch)
        args.per_device_train_batch_size, args.gradient_accumulation_steps = batch, rows // batch

    trainer._update_auto_batch_size = update_both


def _rows_of_a_batch(args: TrainingArguments) -> int:
    """Of all devices together."""
    return args.train_batch_size * args.world_size


def _largest(value: int, args: TrainingArguments) -> int:
    """The largest of the values that the processes have."""
    if args.world_size == 1:
        return value
    shared = torch.tensor(value, device=args.device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return int(shared)


def _mean(value: torch.Tensor, args: TrainingArguments) -> float:
    """The mean of the values that the processes have."""
    total = value.detach().clone()
    if args.world_size > 1:
        torch.distributed.all_reduce(total)
    return total.item() / args.world_size


def _wait_for_all() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def train(
    trainer: Trainer,
    lineage: "Lineage",
    checkpoint: str | None,
    logging_dir: str | None = None,
    max_bad_steps: int = 3,
) -> CheckpointKeeper:
    """Train with the callbacks of this module and write `train_results.json`.

    Args:
        lineage: recorded in every checkpoint.
        checkpoint: what `find_checkpoint` returned.
        logging_dir: of TensorBoard's events; None for runs/ in the output folder.
        max_bad_steps: bad steps in a row that stop the run.

    Exits with 128 + signal number when a signal stopped the run after its checkpoint was saved. Raises UserError
    where memory or disk are full, or too many steps are bad.
    """
    check_disk(trainer)
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
    keeper = CheckpointKeeper(trainer, lineage, stop)
    movement_check = AdapterMovementCheck()
    bad_steps = BadSteps(trainer, max_bad_steps, movement_check)
    for callback in (ProgressLines(), movement_check, bad_steps, keeper, stop):
        trainer.add_callback(callback)
    if trainer.args.auto_find_batch_size:
        keep_rows_per_step(trainer)
    if checkpoint:
        recorded = recorded_attributes(read_state(checkpoint).get("stateful_callbacks", {}))
        # LongestFirstSampler keeps the order that the run began with, whatever a step is now made of.
        trainer.n_longest_first = recorded.get("n_longest_first")
        trainer.args.eval_on_start |= bool(trainer.eval_dataset) and recorded.get("evaluation_is_due", False)
    alone = no_other_run(Path(trainer.args.output_dir)) if trainer.args.process_index == 0 else nullcontext()
    with _one_line_for_bad_days(trainer), alone:
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
            _exit_interrupted(trainer, stop.received)
        metrics["peak_memory_gib"] = round(peak_memory_gib(), 2)
        trainer.save_metrics("train", metrics, combined=False)
        trainer.save_state()
    return keeper


def _exit_interrupted(trainer: Trainer, number: int) -> NoReturn:
    step, steps = trainer.state.global_step, trainer.state.max_steps
    saved = Path(trainer.args.output_dir, f"checkpoint-{step}")
    logger.warning(
        f"{signal.Signals(number).name}: stopped at step {step}/{steps}, "
        + (f"saved in {saved}" if saved.is_dir() else "before there was anything to save")
        + "; the same command with --resume_from_checkpoint True goes on"
    )
    leave_process_group()
    sys.exit(128 + number)


def _one_line_for_bad_days(trainer: Trainer) -> AbstractContextManager:
    return one_line_for_bad_days(Path(trainer.args.output_dir), lambda: _out_of_memory_advice(trainer))


@contextmanager
def one_line_for_bad_days(output_dir: Path, out_of_memory_advice: Callable[[], str]) -> Iterator[None]:
    """Say what to do where the memory or the disk is full, instead of a traceback."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if _is_memory_full(error):
            raise UserError(out_of_memory_advice()) from error
        if not _is_disk_full(error):
            raise
        raise UserError(_disk_full_advice(output_dir)) from error


def _is_memory_full(error: Exception) -> bool:
    return (
        isinstance(error, torch.OutOfMemoryError)
        or should_reduce_batch_size(error)
        or "No executable batch size" in str(error)  # --auto_find_batch_size is at its end
    )


def _is_disk_full(error: Exception) -> bool:
    """torch and safetensors write without Python, and say it in words of their own."""
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


def _out_of_memory_advice(trainer: Trainer) -> str:
    """The remedies that this run has not taken yet, mildest first, with its own values."""
    args, model = trainer.args, trainer.model
    batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if not model.training and args.per_device_eval_batch_size > 1:
        half = args.per_device_eval_batch_size // 2
        return f"out of memory in an evaluation: --per_device_eval_batch_size {half}"
    remedies = []
    if batch > 1:
        longer = math.ceil(accumulation * batch / (batch // 2))
        remedies.append(
            f"--per_device_train_batch_size {batch // 2} --gradient_accumulation_steps {longer} (now {batch} and "
            f"{accumulation})"
        )
    if not args.gradient_checkpointing:
        remedies.append("--gradient_checkpointing True")
    is_adapter = hasattr(model, "peft_config")
    if not is_adapter:
        remedies.append("--use_peft True")
    if not getattr(model, "is_quantized", False):
        remedies.append("--load_in_4bit True")
    if not _is_streamed(trainer):
        longest, columns = max(trainer.train_dataset["length"]), trainer.train_dataset.column_names
        if "prompt_ids" in columns:
            flag = "a shorter --max_source_length or --max_target_length"
        else:
            flag = f"--{'block_size' if 'seq_lengths' in columns else 'model_max_length'} {longest // 2}"
        remedies.append(f"{flag} (the longest row has {longest} tokens)")
    if is_adapter and (rank := model.peft_config["default"].r) > 1:
        remedies.append(f"--lora_rank {rank // 2} (now {rank})")
    return f"out of memory at step {trainer.state.global_step + 1}; in this order: {'; '.join(remedies)}"


# ---------------------------------------------------------------- results


def finish_run(trainer: Trainer, keeper: CheckpointKeeper | None, next_command: str) -> dict[str, float]:
    """Evaluate, make sure of `checkpoint-best`, write results and curves, and name the next command.

    `eval_results.json` describes the model in `checkpoint-best`. Returns its metrics ({} without evaluation data).
    """
    output_dir = Path(trainer.args.output_dir)
    metrics: dict[str, float] = {}
    with _one_line_for_bad_days(trainer):
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
        if keeper is None or keeper.best_step in (None, trainer.state.global_step):
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
    if axes.lines:  # a run shorter than --logging_steps has none
        axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


# ---------------------------------------------------------------- small things


def leave_process_group() -> None:
    """Wait for the other processes and close the connections: gloo's threads abort a process that just exits."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def peak_memory_gib() -> float:
    """Peak memory of this process: of its GPU, or of the process itself on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
