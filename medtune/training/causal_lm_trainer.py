"""Cross entropy on the positions that are learned, for pretraining and supervised fine-tuning.

Rows may hold several texts; before the first step a probe shows whether the model keeps them apart.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import torch
import torch.nn.functional as F
from loguru import logger
from transformers import EvalPrediction, Trainer

from medtune.errors import UserError
from medtune.models.logps import SparseHead
from medtune.reading.tokenization import IGNORED_LABEL
from medtune.training.batches import pad_right
from medtune.training.stage_trainer import StageTrainer, StageTrainingArguments

# Tokens of the three texts in a row that show whether texts see each other.
PROBE_LENGTHS = (32, 16, 16)
# By how much of their spread states may move when a text changes that they must not see: so much, or ten times what
# rounding does, which is not more than a tenth. Sound models measure 0, leaks of untrained ones 7e-4 to 1.
LARGEST_MOVE = 5e-4
ROUNDING_MARGIN = 10
LARGEST_ROUNDING = 0.1


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


class Collator:
    """Makes batches of `input_ids`, `labels`, a mask or positions, the records' `file:line` and the token count.

    Args:
        padding_free: join all rows into one, in which the positions restart with each text.
        rows_of_texts: keep the rows; the positions restart by each row's `seq_lengths`.
    """

    def __init__(self, pad_token_id: int, padding_free: bool = False, rows_of_texts: bool = False):
        self.pad_token_id = pad_token_id
        self.padding_free = padding_free
        self.rows_of_texts = rows_of_texts

    def __call__(self, examples: Sequence[dict]) -> dict:
        ids, labels = ([example[name] for example in examples] for name in ("input_ids", "labels"))
        positions = [
            [
                position
                for length in example.get("seq_lengths") or [len(example["input_ids"])]
                for position in range(length)
            ]
            for example in examples
        ]
        if self.padding_free:
            batch = self._one_row(*(torch.tensor([list(chain(*rows))]) for rows in (ids, labels, positions)))
        else:
            batch = {"input_ids": pad_right(ids, self.pad_token_id), "labels": pad_right(labels, IGNORED_LABEL)}
            if self.rows_of_texts:  # with a mask transformers 5.24 would let the texts of a row see each other
                batch["position_ids"] = pad_right(positions, 0)
            else:
                batch["attention_mask"] = pad_right([[1] * len(row) for row in ids], 0)
        sources = [example["source"] for example in examples]
        batch["sources"] = [source for group in sources for source in ([group] if isinstance(group, str) else group)]
        batch["row_lengths"] = list(map(len, ids))
        return batch

    @staticmethod
    def _one_row(ids: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor) -> dict:
        """[1, tokens] each, and the borders of the texts in the forms that attention and convolutions ask for."""
        starts = (positions[0] == 0).nonzero().flatten()
        borders = torch.cat([starts, torch.tensor([positions.size(1)])]).int()
        lengths = borders.diff()
        return {
            "input_ids": ids,
            "labels": labels.masked_fill(positions == 0, IGNORED_LABEL),  # nothing predicts a first token
            "position_ids": positions,
            "cu_seq_lens_q": borders,
            "cu_seq_lens_k": borders,
            "max_length_q": int(lengths.max()),
            "max_length_k": int(lengths.max()),
            "seq_idx": torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths)[None],
        }


# ---------------------------------------------------------------- texts of one row


@dataclass(frozen=True)
class TextsOfRow:
    """What a row holds several of, such as "document", and the remedy if these attend to each other."""

    name: str
    remedy: str


def moved_states(plain: torch.Tensor, first_changed: torch.Tensor, last_changed: torch.Tensor) -> tuple[float, float]:
    """How far later texts move when the first one changes, and earlier ones when the last one does.

    Both are root mean squares in units of the spread of all states. The second is rounding, since nothing sees what
    comes after it: experts, for example, then get other tokens to multiply together.

    Args:
        plain, first_changed, last_changed: [rows, sum(PROBE_LENGTHS), hidden], any float type.
    """

    def root_mean_square(states: torch.Tensor) -> float:
        return states.double().square().sum(dim=-1).mean().sqrt().item()

    spread = root_mean_square(plain - plain.mean(dim=(0, 1), dtype=torch.float32)) or 1.0
    later = (first_changed - plain)[:, PROBE_LENGTHS[0] :]
    earlier = (last_changed - plain)[:, : -PROBE_LENGTHS[-1]]
    return root_mean_square(later) / spread, root_mean_square(earlier) / spread


# ---------------------------------------------------------------- trainer


class CausalLMTrainer(StageTrainer):
    """Trainer on rows of `input_ids`, `labels`, `length` and `source`; needs `Collator` as its collator.

    Args:
        bytes_per_token: of the evaluation data's learned tokens, for its bits a byte.
        texts_of_row: rows hold several texts that must not see each other, which is checked before the first step.
    """

    columns = ("input_ids", "labels", "seq_lengths")

    def __init__(
        self,
        model: torch.nn.Module,
        bytes_per_token: float | None = None,
        texts_of_row: TextsOfRow | None = None,
        **kwargs,
    ):
        statistics = partial(loss_statistics, bytes_per_token=bytes_per_token)
        super().__init__(model=model, compute_metrics=statistics, **kwargs)
        self.model_accepts_loss_kwargs = True  # so that Trainer counts the learned tokens of a step
        self.head = SparseHead(self.model, one_pass=self.splits_weights)
        self._texts_to_check = texts_of_row

    def _get_num_items_in_batch(self, batch_samples: list[dict], device: torch.device) -> torch.Tensor | None:
        return Trainer._get_num_items_in_batch(self, batch_samples, device)  # tokens, not rows

    @torch.no_grad()
    def _check_texts_of_row(self, model: torch.nn.Module, texts: TextsOfRow) -> None:
        """Raise UserError, in every process, where a text changes the states of another one in its row."""
        tokenizer = self.processing_class
        ordinary = [token_id for token_id in range(len(tokenizer)) if token_id not in tokenizer.added_tokens_decoder]
        generator = torch.Generator().manual_seed(0)
        *plain, other_first, other_last = (
            [ordinary[index] for index in torch.randint(len(ordinary), (length,), generator=generator)]
            for length in (*PROBE_LENGTHS, PROBE_LENGTHS[0], PROBE_LENGTHS[-1])
        )
        rows = plain, [other_first, *plain[1:]], [*plain[:-1], other_last]
        try:
            moved, rounding = moved_states(*(self._states_of(model, row) for row in rows))
        except ValueError as error:
            # transformers 5.24 itself refuses what some layers cannot keep apart.
            if "packed sequences apart" not in str(error):
                raise
            summary, is_apart = str(error).partition(". ")[0], False
        else:
            moved, rounding = self.accelerator.gather(torch.tensor([[moved, rounding]], device=self.args.device)).amax(
                0
            )
            summary = f"when one changes, the states of the others move by {max(moved, rounding):.2g} of their spread"
            largest = max(LARGEST_MOVE, ROUNDING_MARGIN * rounding)
            is_apart = not (moved > largest or max(moved, rounding) > LARGEST_ROUNDING)
        if not is_apart:
            raise UserError(
                f"the {texts.name}s of a row see each other in this model "
                f"({self.model.config.model_type}: {summary}); {texts.remedy}"
            )
        logger.info(f"checked with three texts in a row: a {texts.name} sees itself alone ({summary})")

    def _states_of(self, model: torch.nn.Module, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """[rows, length, hidden] inputs of the head for a row of texts, in the batch layout of this run.

        The row is repeated if batches have several: some attention kernels separate texts only in a batch of one.
        """
        ids = [token_id for text in texts for token_id in text]
        row = {"input_ids": ids, "labels": ids, "seq_lengths": [len(text) for text in texts], "source": ""}
        n_rows = 1 if self.data_collator.padding_free else 2
        if max(self.args.train_batch_size, self.args.eval_batch_size) == 1:
            n_rows = 1
        inputs = self._prepare_inputs(self.data_collator([row] * n_rows))
        for name in ("sources", "row_lengths", "labels"):
            del inputs[name]
        states: list[torch.Tensor] = []
        head = self.model.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
        # With training's dropout, but the same each time; training's random state is restored.
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(0)
            # Not what torch.compile has made of the model: it would compile once more for this length.
            (model if self.is_deepspeed_enabled else self.model)(**inputs, use_cache=False)
        handle.remove()
        return states[0]

    def _forward_learned(self, model, inputs: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """losses [learned], hits [learned], and the mask [batch, length - 1], True where the next token is learned."""
        if self._texts_to_check:
            self._check_texts_of_row(model, self._texts_to_check)
            self._texts_to_check = None
        labels = inputs.pop("labels")
        learned = labels[:, 1:] != IGNORED_LABEL
        compute = partial(losses_and_hits, label_smoothing=self.args.label_smoothing_factor if model.training else 0.0)
        losses, hits = self.head(model, inputs, F.pad(learned, (0, 1), value=False), labels[:, 1:][learned], compute)
        return losses, hits, learned

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean loss over the learned tokens of a step, over all processes and micro-batches.

        Raises UserError with the step and the records where nothing is learned.
        """
        assert not return_outputs, "evaluation goes through prediction_step and keeps no logits"
        sources, n_tokens = inputs.pop("sources"), sum(inputs.pop("row_lengths"))
        losses, hits, _ = self._forward_learned(model, inputs)
        if len(losses) == 0:
            raise UserError(f"step {self.state.global_step + 1}: no token to learn in {', '.join(sources)}")
        self.note_figures(n_tokens, token_accuracy=hits)
        if num_items_in_batch is None or self.args.average_tokens_across_devices:
            return self.mean_over_step(losses, num_items_in_batch)
        return losses.sum() / num_items_in_batch  # which then counts this process alone

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """[batch, 3] sums of loss, hits and learned tokens, an example a row, instead of logits."""
        inputs = self._prepare_inputs(inputs)
        inputs.pop("sources")
        row_lengths = inputs.pop("row_lengths")
        with torch.no_grad(), self.compute_loss_context_manager():
            losses, hits, learned = self._forward_learned(model, inputs)
        statistics = torch.zeros(*learned.shape, 3, device=learned.device)
        statistics[learned] = torch.stack([losses, hits, torch.ones_like(losses)], dim=-1)
        if len(learned) < len(row_lengths):  # joined into one: an example a row all the same, which accelerate counts
            of_tokens = F.pad(statistics[0], (0, 0, 1, 0))
            statistics = torch.stack([row.sum(dim=0) for row in of_tokens.split(row_lengths)])
        else:
            statistics = statistics.sum(dim=1)
        return None, statistics, statistics
