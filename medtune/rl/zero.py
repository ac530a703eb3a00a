"""Only for DeepSpeed's ZeRO-1 and 2: a learner with gradients and optimizer split over the processes."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import TrainingArguments

from medtune.rl.learner import Learner


class RoleModule(torch.nn.Module):
    """What DeepSpeed takes for its one model: the trained weights of a role, and any function of them as its forward
    pass."""

    def __init__(self, weights: list[torch.nn.Parameter], accelerator: Accelerator):
        super().__init__()
        self.weights = torch.nn.ParameterList(weights)
        self.accelerator = accelerator

    def forward(self, compute: Callable, *inputs: object) -> torch.Tensor | tuple[torch.Tensor, ...]:
        with self.accelerator.autocast():  # in here, because DeepSpeed 0.19 switches off what is entered outside
            return compute(*inputs)


class ZeroLearner(Learner):
    """A learner whose steps are those of a DeepSpeed engine of its own."""

    def __init__(
        self,
        weights: dict[str, torch.nn.Parameter],
        training_args: TrainingArguments,
        n_updates: int,
        accelerator: Accelerator,
    ):
        super().__init__(weights, training_args, n_updates, accelerator)
        import deepspeed

        config = json.loads(Path(training_args.deepspeed).read_text(encoding="utf-8")) | {
            "train_batch_size": accelerator.num_processes,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,  # `step` says where a step ends
            "gradient_clipping": training_args.max_grad_norm,
            # Trained weights are float32; autocast decides the dtype of computation.
            "bf16": {"enabled": False},
            "fp16": {"enabled": False},
        }
        module = RoleModule(self.weights, accelerator)
        self.engine = deepspeed.initialize(model=module, optimizer=self.optimizer, config=config)[0]

    def forward(self, compute: Callable, *inputs: object) -> torch.Tensor | tuple[torch.Tensor, ...]:
        return self.engine(compute, *inputs)

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss * self.accelerator.num_processes)  # the engine takes the mean of the processes

    def step(self) -> float:
        self.engine.step()
        return float(self.engine.get_global_grad_norm())


# ---------------------------------------------------------------- checkpoints


def save_engines(learners: dict[str, ZeroLearner], checkpoint: Path, step: int) -> None:
    """Every process its part of the optimizers."""
    for role, learner in learners.items():
        learner.engine.save_checkpoint(str(checkpoint / f"global_step{step}"), tag=role)


def load_engines(learners: dict[str, ZeroLearner], checkpoint: Path, step: int) -> None:
    for role, learner in learners.items():
        learner.engine.load_checkpoint(str(checkpoint / f"global_step{step}"), tag=role)
