"""Train the weights of a role: optimizer, schedule, and clipped gradients of all processes."""

import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import Trainer, TrainingArguments, get_scheduler


class Learner:
    """The trained weights of a role with their optimizer and schedule, in one process or several."""

    def __init__(
        self,
        weights: dict[str, torch.nn.Parameter],
        training_args: TrainingArguments,
        n_updates: int,
        accelerator: Accelerator,
    ):
        self.accelerator = accelerator
        self.weights = list(weights.values())
        self.max_grad_norm = training_args.max_grad_norm or math.inf
        # Matrices B of adapters that no gradient has reached yet.
        self.unreached = {name for name in weights if ".lora_B." in name}
        for name, weight in weights.items():
            weight.requires_grad_(True)  # roles take turns in it, but hooks are set here
            if name in self.unreached:
                weight.register_hook(partial(self._note_gradient, name))
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(training_args)
        self.optimizer = optimizer_class(self.weights, weight_decay=training_args.weight_decay, **options)
        self.scheduler = get_scheduler(
            training_args.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=training_args.get_warmup_steps(n_updates),
            num_training_steps=n_updates,
            scheduler_specific_kwargs=training_args.lr_scheduler_kwargs,
        )

    def forward(self, compute: Callable, *inputs: object) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """What a function of the weights computes of the inputs."""
        with self.accelerator.autocast():
            return compute(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        """Add to the gradients of a loss that has been divided by what all processes have."""
        loss.backward()

    def step(self) -> float:
        """An optimizer step on the gradients of all processes; returns their norm before clipping."""
        self._share_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    def skip(self) -> None:
        """An update without a step; the schedule goes on."""
        with warnings.catch_warnings():
            # torch 2.13 warns where the first update has none.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self.scheduler.step()

    def _share_gradients(self) -> None:
        """Add up the gradients of all processes, in one message."""
        if self.accelerator.num_processes == 1:
            return
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in self.weights]
        flat = torch.cat([gradient.flatten().float() for gradient in gradients])
        shared = self.accelerator.reduce(flat, reduction="sum").split([w.numel() for w in self.weights])
        for weight, gradient in zip(self.weights, shared, strict=True):
            weight.grad = gradient.view_as(weight).to(weight.dtype)

    def _note_gradient(self, name: str, gradient: torch.Tensor) -> None:
        if name in self.unreached and gradient.any():
            self.unreached.discard(name)


# ---------------------------------------------------------------- checkpoints


def save_optimizers(learners: dict[str, Learner], folder: Path) -> None:
    torch.save({role: learner.optimizer.state_dict() for role, learner in learners.items()}, folder / "optimizer.pt")


def load_optimizers(learners: dict[str, Learner], folder: Path, device: torch.device) -> None:
    states = torch.load(folder / "optimizer.pt", map_location=device, weights_only=True)
    for role, learner in learners.items():
        learner.optimizer.load_state_dict(states[role])
