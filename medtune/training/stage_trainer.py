"""The base of all stages' trainers: arguments, row order, and figures between two log lines.

A stage's trainer adds its loss, and a collator whose batches name the records in `sources`.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from loguru import logger
from peft import PeftModel
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.utils import is_liger_kernel_available

from medtune.errors import UserError
from medtune.models.adapters import check_adapter_tensors
from medtune.models.loading import load_saved_weights
from medtune.models.router_loss import describe_router_loss, router_loss_weight
from medtune.models.text_attention import Layout
from medtune.models.text_part import text_config
from medtune.training.compilation import compile_layers
from medtune.training.layout import TextsOfRow, choose_layout

# ---------------------------------------------------------------- arguments


@dataclass
class StageTrainingArguments(TrainingArguments):
    """transformers' arguments with the defaults of fine-tuning."""

    logging_steps: float = field(
        default=10, metadata={"help": "A line in the log every so many steps, or below 1 this share of all."}
    )
    gradient_checkpointing: bool = field(
        default=True, metadata={"help": "Compute activations again instead of keeping them: less memory, slower."}
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "bfloat16 mixed precision; on unless --fp16 is, or the GPU has none."}
    )
    padding_free: Literal["auto", "True", "False"] = field(
        default="auto",
        metadata={
            "help": "Join the rows of a batch into one, so that none is padded; auto: with FlashAttention or on a CPU, "
            "if the model keeps them apart."
        },
    )
    use_liger_kernel: bool = field(
        default=False,
        metadata={"help": "Fused norms, rotary embeddings and SwiGLU of the package liger-kernel, on GPUs."},
    )

    def __post_init__(self):
        if self.use_liger_kernel:
            if not is_liger_kernel_available():
                raise UserError(
                    "--use_liger_kernel: the package liger-kernel is not installed; pip install liger-kernel, or leave "
                    "the flag out"
                )
            # Its losses would pass by ours and compute the head at every token.
            self.liger_kernel_config = {"cross_entropy": False, "fused_linear_cross_entropy": False}
        self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        super().__post_init__()
        if not self.do_train and not self.do_eval:
            raise UserError("neither --do_train nor --do_eval is given, so there is nothing to do")


# ---------------------------------------------------------------- order of the rows


class LongestFirstSampler(Sampler[int]):
    """A seeded order for each epoch; the first epoch starts with the longest examples.

    So a run that does not fit in memory fails in its first step. The epoch comes from the trainer's state, which is
    right after a resume too, whatever wraps the sampler.
    """

    def __init__(self, trainer: Trainer, lengths: Sequence[int], seed: int, group_by_length: bool):
        self.trainer = trainer
        self.lengths = list(lengths)
        self.seed = seed
        self.group_by_length = group_by_length

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        args = self.trainer.args
        epoch = int(self.trainer.state.epoch or 0)
        generator = torch.Generator().manual_seed(self.seed + epoch)
        step_size = args.train_batch_size * args.world_size
        if self.group_by_length:
            n_grouped = step_size * args.gradient_accumulation_steps
            order = get_length_grouped_indices(self.lengths, n_grouped, generator=generator)
        else:
            order = torch.randperm(len(self.lengths), generator=generator).tolist()
        if epoch == 0:
            n_longest = getattr(self.trainer, "n_longest_first", None) or step_size  # of a resumed run as it began
            longest = sorted(order, key=self.lengths.__getitem__, reverse=True)[:n_longest]
            are_first = set(longest)
            order = longest + [index for index in order if index not in are_first]
        return iter(order)


# ---------------------------------------------------------------- trainer


class StageTrainer(Trainer):
    """Trainer on rows with `length` and `source`, in which each row of a step counts the same.

    A subclass has `compute_loss`, `prediction_step` and `columns`, the columns of a row that its collator reads.

    Args:
        texts_of_row: rows hold several texts that must not see each other, which is checked before the first step.
    """

    columns: ClassVar[tuple[str, ...]]
    rows_share_prompts: ClassVar[bool] = False  # those of a batch, which then may pass once
    layout, layout_is_chosen = Layout.PADDED, False  # until the first batch
    loss_is_scaled_for_ga = True  # `mean_over_step` has divided by all micro-batches

    def __init__(
        self,
        model: torch.nn.Module,
        args: StageTrainingArguments,
        texts_of_row: TextsOfRow | None = None,
        **kwargs,
    ):
        if hasattr(text_config(model.config), "output_router_logits"):
            text_config(model.config).output_router_logits = False  # the head asks for it where it is added
        if args.gradient_checkpointing and isinstance(model, PeftModel):
            if _zero_stage(args) == 3:
                # The other kind fails with PEFT under ZeRO-3: https://github.com/huggingface/trl/issues/2514.
                args.gradient_checkpointing_kwargs = {
                    **(args.gradient_checkpointing_kwargs or {}),
                    "use_reentrant": True,
                }
            model.enable_input_require_grads()
        if args.torch_compile:
            compile_layers(model, args.torch_compile_backend, args.torch_compile_mode)
            args.torch_compile_backend = args.torch_compile_mode = None  # or Accelerate would compile the whole model
        super().__init__(model=model, args=args, **kwargs)
        if args.n_gpu > 1:
            raise UserError(
                f"{args.n_gpu} GPUs for one process that has the model on one of them: start with torchrun "
                f"--nproc_per_node {args.n_gpu}, or give --device_map auto or CUDA_VISIBLE_DEVICES=0"
            )
        self.texts_of_row = texts_of_row
        self.router_loss_weight = router_loss_weight(self.model)
        if line := describe_router_loss(self.model):
            logger.info(line)
        self._window: dict[str, list[torch.Tensor]] = {}
        self._window_start = time.monotonic()

    @property
    def splits_weights(self) -> bool:
        """Whether each process holds only a part of the weights, usable only in a forward pass (ZeRO-3)."""
        return _zero_stage(self.args) == 3

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*self.columns, "source"]

    def _prepare_inputs(self, inputs: dict) -> dict:
        """Trainer's, of each batch of training and evaluation; before the first one the layout is chosen."""
        self.choose_layout_once(self.model_wrapped)
        return super()._prepare_inputs(inputs)

    def choose_layout_once(self, model: torch.nn.Module) -> None:
        """Choose the layout of batches, and record it in the arguments for a resume.

        model: as its forward passes are called.
        """
        if not self.layout_is_chosen:
            self.layout = choose_layout(self, model, self.texts_of_row)
            self.args.padding_free = str(self.layout is not Layout.PADDED)
            self.layout_is_chosen = True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Trainer's, which goes on silently where tensors have other names than the model's (transformers 5.24)."""
        if isinstance(self.model, PeftModel):
            check_adapter_tensors(self.model, resume_from_checkpoint, "--resume_from_checkpoint")
        elif load_saved_weights(self.model, resume_from_checkpoint):
            return
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's; raises UserError where the checkpoint's optimizer is of other weights than are trained."""
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            if "parameter group" not in str(error):
                raise
            raise UserError(
                f"--resume_from_checkpoint {checkpoint}: its optimizer is of other weights than this version trains "
                "(of a multimodal model the language model alone); train it again (--resume_from_checkpoint False "
                "--overwrite_output_dir True keeps it beside)"
            ) from error

    def _get_train_sampler(self, train_dataset=None) -> Sampler[int]:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        grouped = self.args.train_sampling_strategy == "group_by_length"
        return LongestFirstSampler(self, self.train_dataset["length"][:], seed, grouped)

    def _get_num_items_in_batch(self, batch_samples: list[dict], device: torch.device) -> torch.Tensor:
        """The rows of a step in all micro-batches and processes."""
        n_rows = torch.tensor(sum(len(batch["sources"]) for batch in batch_samples), device=device)
        return self.accelerator.gather(n_rows).sum()

    def mean_over_step(self, losses: torch.Tensor, n_items: torch.Tensor | None) -> torch.Tensor:
        """This micro-batch's part of the mean loss over a step's items; for None the micro-batch's own mean."""
        if n_items is None:
            return losses.mean()
        # DDP averages gradients over processes, n_items counts those of all.
        return losses.sum() / n_items * self.accelerator.num_processes

    def with_router_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """A micro-batch's part of a step's loss, and of the mean of its routers' load-balancing losses if it is added.

        The trainer's `head` has that of the last pass.
        """
        if self.head.router_loss is None:
            return loss
        return loss + self.router_loss_weight * self.head.router_loss / self.current_gradient_accumulation_steps

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        """Trainer's; evaluations and checkpoints take no time from the tokens a second of training."""
        start = time.monotonic()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        # Where a line of the log was written, the window began anew after `start`.
        self._window_start += time.monotonic() - max(start, self._window_start)

    def note_figures(self, n_tokens: torch.Tensor | int, **figures: torch.Tensor) -> None:
        """Keep [N] figures of items for their mean in the next log line; nan for an item without one."""
        device = self.args.device
        sums = {"tokens": torch.stack([torch.as_tensor(n_tokens, device=device).double(), torch.ones(()).to(device)])}
        for name, values in figures.items():
            values = values.detach().double()
            sums[name] = torch.stack([values.nansum(), (~values.isnan()).sum()]).to(device)
        self._window = {name: self._window.get(name, 0.0) + total for name, total in sums.items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log, with the means of the figures since the last line, over all processes, and tokens a second."""
        if "loss" in logs and self._window:
            now = time.monotonic()
            names = list(self._window)
            totals = self.accelerator.gather(torch.stack(list(self._window.values()))[None]).sum(dim=0).tolist()
            of_all = dict(zip(names, totals, strict=True))
            n_tokens, _ = of_all.pop("tokens")
            logs |= {name: total / count for name, (total, count) in of_all.items() if count}
            logs["tokens_per_second"] = round(n_tokens / max(now - self._window_start, 1e-9), 1)
            self._window, self._window_start = {}, now
        super().log(logs, start_time)


def _zero_stage(args: TrainingArguments) -> int:
    return args.deepspeed_plugin.zero_stage if args.deepspeed_plugin is not None else 0
