"""Checks while training: adapters that do not move, losses that are not finite or explode."""

import math
from collections import deque
from collections.abc import Callable, Iterator

import torch
from loguru import logger
from transformers import Trainer, TrainerCallback

from medtune.errors import UserError
from medtune.training.processes import largest_of_processes

# A loss has exploded if it is twice the largest of so many previous steps and three nats above it: well
# separated pairs have losses near 0, and a single wrong pair costs more than two nats.
RECENT_STEPS = 50
SOUND, EXPLODED, NOT_FINITE = range(3)  # what a step is, the worst last


class AdapterMovementCheck(TrainerCallback):
    """Checks that the first step with a learning rate above 0 changed every LoRA matrix that it should.

    Otherwise dead gradients (checkpointing without input gradients, a wrapped module) would go unnoticed.
    A of a new adapter does not change: with B = 0 its gradient is 0. Under a score head of zeros every gradient is.
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


class BadSteps(TrainerCallback):
    """Skips a step whose loss or gradient is not finite, and stops after several bad steps in a row.

    A step with an exploding loss is bad too, but it is taken: with clipped gradients many runs recover.
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
        largest = max(self.recent) if len(self.recent) >= RECENT_STEPS // 2 else math.inf
        # fp16's loss scaler sees to gradients itself, and DeepSpeed has used them.
        gradients = [] if args.fp16 or args.deepspeed else [p.grad for p in model.parameters() if p.grad is not None]
        if not math.isfinite(loss):
            fault, what = NOT_FINITE, f"the loss is {loss}"
        elif gradients and not torch.isfinite(norm := torch.nn.utils.get_total_norm(gradients)):
            fault, what = NOT_FINITE, f"the gradient is {norm.item()}, the loss {loss:.4f}"
        elif loss > largest + max(largest, 3):
            fault, what = EXPLODED, f"the loss is {loss:.4f}, where {largest:.4f} was the largest"
        else:
            fault, what = SOUND, "another process has a bad batch"
        worst = largest_of_processes(fault, args)
        if worst == SOUND:
            self.in_a_row = 0
            self.recent.append(loss)
            return
        self.in_a_row += 1
        line = f"step {state.global_step + 1}: {what} at learning rate {self.trainer._get_learning_rate():.2e}"
        line += f" on {self._records(losses, fault)}"
        if self.in_a_row >= self.most or (worst == NOT_FINITE and args.deepspeed):
            raise UserError(
                f"{line}; {self.in_a_row} bad step(s) in a row (--max_bad_steps {self.most}): look at these records, "
                "and if they are sound lower --learning_rate or raise --warmup_ratio"
            )
        logger.warning(f"{line}; bad step {self.in_a_row} in a row" + (", left out" if worst == NOT_FINITE else ""))
        if worst == NOT_FINITE and not args.fp16:
            for parameter in model.parameters():
                parameter.grad = None
            self.movement_check.before = None

    def _records(self, losses: torch.Tensor, fault: int) -> str:
        """`file:line` of the micro-batches that are not finite, or else of the one with the largest loss."""
        bad = [index for index, loss in enumerate(losses.tolist()) if not math.isfinite(loss)]
        names = [name for index in bad or [int(losses.argmax())] for name in self.micro_batches[index][1]]
        if torch.distributed.is_initialized():
            gathered: list[list[str]] = [[]] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(gathered, names if fault else [])
            names = [name for of_process in gathered for name in of_process]
        return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
