"""Cross entropy on the tokens that are learned, for pretraining and supervised fine-tuning."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from transformers import EvalPrediction, Trainer

from medtune.errors import UserError
from medtune.models.logps import SparseHead
from medtune.reading.tokenization import IGNORED_LABEL
from medtune.training.batches import pad_right
from medtune.training.stage_trainer import StageTrainer, StageTrainingArguments


@dataclass
class CausalLMConfig(StageTrainingArguments):
    learning_rate: float = field(default=2e-5, metadata={"help": "Highest learning rate."})


# ---------------------------------------------------------------- loss


def token_losses(logits: torch.Tensor, ids: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """[n] float32 cross entropy -log p(id), in nats, of [n] int64 ids under [n, vocabulary] logits of any float type.

    With smoothing s: (1 - s) x that + s x the mean of -log p over the vocabulary (Szegedy et al. 2016,
    https://arxiv.org/abs/1512.00567, section 7).
    """
    return F.cross_entropy(logits.float(), ids, reduction="none", label_smoothing=label_smoothing)


def losses_and_hits(logits: torch.Tensor, ids: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """[2, n] float32: losses, and 1 where the likeliest token is the right one."""
    hits = logits.detach().argmax(dim=-1) == ids
    return torch.stack([token_losses(logits, ids, label_smoothing), hits.float()])


def loss_statistics(prediction: EvalPrediction, bytes_per_token: float | None = None) -> dict[str, float]:
    """Evaluation metrics from [examples, 3] sums of loss, hits and learned tokens: means over tokens, not batches.

    With `bytes_per_token` also the bits a byte of the text costs, which compares models of different tokenizers.
    """
    loss_sum, n_hits, n_tokens = prediction.predictions.astype("float64").sum(axis=0)
    loss = loss_sum / n_tokens
    with torch.no_grad():
        perplexity = torch.exp(torch.tensor(loss)).item()
    metrics = {"loss": loss, "perplexity": perplexity, "token_accuracy": n_hits / n_tokens}
    if bytes_per_token:
        metrics["bits_per_byte"] = loss / math.log(2) / bytes_per_token
    return metrics


# ---------------------------------------------------------------- batches


@dataclass
class Collator:
    """Makes padded batches of `input_ids`, `labels`, `attention_mask` and the records' `sources`.

    Where rows hold several texts (`seq_lengths`) they have `position_ids`, which restart with each text.
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[dict]) -> dict:
        ids, labels = ([example[name] for example in examples] for name in ("input_ids", "labels"))
        batch = {
            "input_ids": pad_right(ids, self.pad_token_id),
            "labels": pad_right(labels, IGNORED_LABEL),
            "attention_mask": pad_right([[1] * len(row) for row in ids], 0),
        }
        if "seq_lengths" in examples[0]:
            lengths = [example["seq_lengths"] for example in examples]
            positions = [[position for length in row for position in range(length)] for row in lengths]
            batch["position_ids"] = pad_right(positions, 0)
            batch["labels"].masked_fill_(batch["position_ids"] == 0, IGNORED_LABEL)  # nothing predicts a first token
        sources = [example["source"] for example in examples]
        batch["sources"] = [source for group in sources for source in ([group] if isinstance(group, str) else group)]
        return batch


# ---------------------------------------------------------------- trainer


class CausalLMTrainer(StageTrainer):
    """Trainer on rows of `input_ids`, `labels`, `length` and `source`; needs `Collator` as its collator.

    Args:
        bytes_per_token: of the evaluation data's learned tokens, for its bits a byte.
    """

    columns = ("input_ids", "labels", "seq_lengths")

    def __init__(self, model: torch.nn.Module, bytes_per_token: float | None = None, **kwargs):
        statistics = partial(loss_statistics, bytes_per_token=bytes_per_token)
        super().__init__(model=model, compute_metrics=statistics, **kwargs)
        self.model_accepts_loss_kwargs = True  # so that Trainer counts the learned tokens of a step
        self.head = SparseHead(self.model, self.splits_weights, self.router_loss_weight > 0)

    def _get_num_items_in_batch(self, batch_samples: list[dict], device: torch.device) -> torch.Tensor | None:
        return Trainer._get_num_items_in_batch(self, batch_samples, device)  # tokens, not rows

    def _forward_learned(self, model, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """losses [learned], hits [learned], and the mask [batch, length - 1], True where the next token is learned."""
        labels = batch["labels"]
        learned = labels[:, 1:] != IGNORED_LABEL
        compute = partial(losses_and_hits, label_smoothing=self.args.label_smoothing_factor if model.training else 0.0)
        predicts = F.pad(learned, (0, 1), value=False)
        losses, hits = self.head(model, batch, predicts, labels[:, 1:][learned], compute, self.layout)
        return losses, hits, learned

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean loss over the learned tokens of a step, over all processes and micro-batches.

        Raises UserError with the step and the records where nothing is learned.
        """
        assert not return_outputs, "evaluation goes through prediction_step and keeps no logits"
        losses, hits, _ = self._forward_learned(model, inputs)
        if len(losses) == 0:
            raise UserError(f"step {self.state.global_step + 1}: no token to learn in {', '.join(inputs['sources'])}")
        self.note_figures(inputs["attention_mask"].sum(), token_accuracy=hits)
        if num_items_in_batch is None or self.args.average_tokens_across_devices:
            return self.with_router_loss(self.mean_over_step(losses, num_items_in_batch))
        return self.with_router_loss(losses.sum() / num_items_in_batch)  # which then counts this process alone

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """[batch, 3] sums of loss, hits and learned tokens, an example a row, instead of logits."""
        batch = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            losses, hits, learned = self._forward_learned(model, batch)
        statistics = torch.zeros(*learned.shape, 3, device=learned.device)
        statistics[learned] = torch.stack([losses, hits, torch.ones_like(losses)], dim=-1)
        statistics = statistics.sum(dim=1)
        return None, statistics, statistics
