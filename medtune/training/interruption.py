"""Save a checkpoint at a signal, in all processes at the same step."""

import signal
import sys
from pathlib import Path
from typing import NoReturn

import torch
from loguru import logger
from transformers import Trainer, TrainerCallback, TrainingArguments

from medtune.errors import end_at_next_signal
from medtune.training.processes import largest_of_processes, leave_process_group


class StoppedInEvaluationError(Exception):
    """A signal came during an evaluation, which is given up."""


class StoppedInRolloutError(Exception):
    """A signal came while replies were written or judged, which are given up."""


class NothingLeftError(Exception):
    """The checkpoint that a run resumes from is its last step."""


class SignalListener:
    """Notes SIGTERM, SIGINT and SIGHUP; a second signal kills the process."""

    def __init__(self, args: TrainingArguments):
        self.args = args
        self.received: int | None = None
        self.previous: dict[int, object] = {}

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            ignored = number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN  # nohup
            if number not in self.previous and not ignored:
                self.previous[number] = signal.signal(number, self._receive)

    def stop_listening(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def any_received(self) -> bool:
        """Whether a signal has reached one of the processes, all of which must ask."""
        self.received = largest_of_processes(self.received or 0, self.args) or None
        return self.received is not None

    def _receive(self, number: int, frame: object) -> None:
        end_at_next_signal(number)
        self.received = number
        logger.warning(f"{signal.Signals(number).name}: saving a checkpoint and stopping; again to stop at once")


class StopSignals(SignalListener, TrainerCallback):
    """At a signal, saves the last whole step and stops.

    A step in progress or an evaluation is aborted, and repeated by the resumed run with the same random numbers.
    The processes agree on the step, since the signal reaches them at different moments.
    """

    def __init__(self, trainer: Trainer):
        super().__init__(trainer.args)
        self.trainer = trainer
        self.loss_sum = torch.tensor(0.0)
        self.random_state: list[torch.Tensor] = []
        self.is_training = False
        self.evaluation_is_due = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.is_training = True
        self._keep_random_state()
        self.listen()

    def on_train_end(self, args, state, control, **kwargs):
        self.is_training = False
        self.stop_listening()

    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            raise NothingLeftError  # transformers 5.24 would train one more step where the last epoch is not whole

    def on_step_begin(self, args, state, control, **kwargs):
        self.loss_sum = self.trainer._tr_loss.clone()

    def on_substep_end(self, args, state, control, **kwargs):
        # DeepSpeed keeps the sums of a step's gradients and counts its micro-batches in the checkpoint.
        if not args.deepspeed and self.any_received():
            control.should_training_stop = True
            self.trainer._tr_loss.copy_(self.loss_sum)
            self._restore_random_state()

    def on_step_end(self, args, state, control, **kwargs):
        self._keep_random_state()
        self.evaluation_is_due = False
        if self.any_received():
            control.should_save = control.should_training_stop = True
            self.evaluation_is_due = control.should_evaluate
            control.should_evaluate = False

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.received:
            control.should_log = control.should_evaluate = False
            is_saved = Path(args.output_dir, f"checkpoint-{state.global_step}").is_dir()
            control.should_save = state.global_step > 0 and not is_saved

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.is_training and self.any_received():
            self.evaluation_is_due = True
            self._restore_random_state()
            raise StoppedInEvaluationError

    def on_evaluate(self, args, state, control, **kwargs):
        # An evaluation's DataLoader draws random numbers; training continues with its own.
        if self.is_training:
            self._restore_random_state()

    def _keep_random_state(self) -> None:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        self.random_state = [torch.get_rng_state(), *cuda]

    def _restore_random_state(self) -> None:
        torch.set_rng_state(self.random_state[0])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(self.random_state[1:])


def exit_interrupted(number: int, place: str, saved: Path) -> NoReturn:
    """Say where a run stopped (step 3/10) and how it goes on, and end with 128 + signal number."""
    logger.warning(
        f"{signal.Signals(number).name}: stopped at {place}, "
        + (f"saved in {saved}" if saved.is_dir() else "before there was anything to save")
        + "; the same command with --resume_from_checkpoint True goes on"
    )
    leave_process_group()
    sys.exit(128 + number)
