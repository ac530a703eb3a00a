"""TRL's SFTTrainer for ids and labels that are ready, with the output head on learned positions only.

TRL scores every position on devices without Triton; with a vocabulary of 152,000 most of a step goes there. Here a
hook hands the head the hidden states of learned positions alone, so it works for any causal language model, wrapped
by PEFT, DDP or DeepSpeed, and the loss and its gradients are those of the plain head.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from loguru import logger
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Sampler
from transformers import EvalPrediction, Trainer
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from medtune.errors import UserError

# The label of positions without loss, as reading/encoding.py writes it.
IGNORED_LABEL = torch.nn.CrossEntropyLoss().ignore_index
# Positions whose float32 log-probabilities exist at a time: 1024 x 152k x 4 bytes = 0.6 GB.
LOSS_CHUNK = 1024
# Tokens of the three texts in a row that show whether texts see each other.
PROBE_LENGTHS = (32, 16, 16)
# By how much of their spread states may move when a text changes that they must not see: so much, or ten times what
# rounding does, which is not more than a tenth. Sound models measure 0, leaks of untrained ones 7e-4 to 1.
LARGEST_MOVE = 5e-4
ROUNDING_MARGIN = 10
LARGEST_ROUNDING = 0.1


# ---------------------------------------------------------------- arguments


@dataclass
class CausalLMConfig(SFTConfig):
    """SFTConfig without the fields that ids and labels made by reading/rows.py leave without a meaning."""

    max_length: int | None = field(default=None, init=False)
    truncation_mode: str = field(default="keep_start", init=False)
    dataset_text_field: str = field(default="text", init=False)
    dataset_kwargs: dict | None = field(default=None, init=False)
    dataset_num_proc: int | None = field(default=None, init=False)
    model_init_kwargs: dict | None = field(default=None, init=False)
    trust_remote_code: bool = field(default=False, init=False)
    chat_template_path: str | None = field(default=None, init=False)
    eos_token: str | None = field(default=None, init=False)
    pad_token: str | None = field(default=None, init=False)
    shuffle_dataset: bool = field(default=False, init=False)
    packing_strategy: str = field(default="bfd", init=False)
    eval_packing: bool | None = field(default=False, init=False)
    completion_only_loss: bool | None = field(default=False, init=False)
    assistant_only_loss: bool = field(default=False, init=False)
    loss_type: str = field(default="nll", init=False)
    pad_to_multiple_of: int | str | None = field(default=None, init=False)
    router_aux_loss_coef: float | None = field(default=0.0, init=False)
    use_liger_kernel: bool = field(default=False, init=False)

    def __post_init__(self):
        super().__post_init__()
        if not self.do_train and not self.do_eval:
            raise UserError("neither --do_train nor --do_eval is given, so there is nothing to do")


# ---------------------------------------------------------------- loss


def token_losses(
    logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy and top-1 hit per position, computed in float32 in chunks.

    Args:
        logits: [positions, vocabulary], any float type.
        targets: [positions], int64.

    Returns:
        losses [positions] float32, with gradient; hits [positions] bool.
    """

    def chunk_losses(chunk_logits: torch.Tensor, chunk_targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(chunk_logits.float(), chunk_targets, reduction="none", label_smoothing=label_smoothing)

    chunks = zip(logits.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True)
    if torch.is_grad_enabled() and len(logits) > LOSS_CHUNK:
        losses = [checkpoint(chunk_losses, *chunk, use_reentrant=False) for chunk in chunks]
    else:
        losses = [chunk_losses(*chunk) for chunk in chunks]
    return torch.cat(losses), logits.detach().argmax(dim=-1) == targets


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
    """TRL's collator, and beside the tensors the records' `file:line` and the number of real tokens.

    Args:
        padding_free: all rows become one, in which the positions restart with each text.
        rows_of_texts: the rows stay, and the positions restart where a row's `seq_lengths` say.
    """

    def __init__(self, pad_token_id: int, padding_free: bool = False, rows_of_texts: bool = False):
        self.rows_of_texts = rows_of_texts
        self.collate = DataCollatorForLanguageModeling(
            pad_token_id=pad_token_id, padding_free=padding_free, return_position_ids=rows_of_texts
        )

    def __call__(self, examples: Sequence[dict]) -> dict:
        batch = self.collate(examples)
        if self.rows_of_texts:
            # With a mask transformers 5.24 would let the texts of a row see each other.
            del batch["attention_mask"]
        sources = [example["source"] for example in examples]
        batch["sources"] = [source for group in sources for source in ([group] if isinstance(group, str) else group)]
        batch["n_tokens"] = sum(len(example["input_ids"]) for example in examples)
        return batch


class LongestFirstSampler(Sampler[int]):
    """A seeded order for each epoch; the first one starts with the longest examples.

    A run that does not fit in memory so fails in its first step. The epoch comes from the trainer's state, which
    is right after a resume too, whatever wraps the sampler.
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
            order = longest + [index for index in order if index not in set(longest)]
        return iter(order)


# ---------------------------------------------------------------- texts of one row


@dataclass(frozen=True)
class TextsOfRow:
    """What the rows of a run hold several of, such as "document"; and the remedy where these see each other."""

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


@contextmanager
def trained_weights_kept(model: torch.nn.Module) -> Iterator[None]:
    """Around a TRL trainer's `__init__`, which rounds an adapter on a quantized base to bfloat16: undo that.

    Small updates of the adapter would be lost.
    """
    trained = {name: weights.data for name, weights in model.named_parameters() if weights.requires_grad}
    yield
    for name, weights in model.named_parameters():
        if name in trained:
            weights.data = trained[name]


class CausalLMTrainer(SFTTrainer):
    """SFTTrainer on rows of `input_ids`, `labels`, `length` and `source`; needs `Collator` as its collator.

    Args:
        bytes_per_token: of the evaluation data's learned tokens, for its bits a byte.
        texts_of_row: rows hold several texts that must not see each other, which is checked before the first step.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        bytes_per_token: float | None = None,
        texts_of_row: TextsOfRow | None = None,
        **kwargs,
    ):
        statistics = partial(loss_statistics, bytes_per_token=bytes_per_token)
        text_config = model.config.get_text_config()
        router_aux_loss_coef = getattr(text_config, "router_aux_loss_coef", None)
        with trained_weights_kept(model):
            super().__init__(model=model, compute_metrics=statistics, **kwargs)
        if router_aux_loss_coef is not None:
            text_config.router_aux_loss_coef = router_aux_loss_coef  # TRL writes ours into what is saved
        # Our loss is divided by the tokens of the whole step, so Trainer must not divide by accumulation again.
        self.model_accepts_loss_kwargs = True
        self._texts_to_check = texts_of_row
        self._learned_positions: torch.Tensor | None = None
        self.model.get_output_embeddings().register_forward_pre_hook(self._keep_learned_positions)
        self._window = {"n_tokens": 0, "n_hits": 0, "n_learned": 0, "start": time.monotonic()}

    def _keep_learned_positions(self, head: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple | None:
        """[batch, length, hidden] to [learned positions, hidden]; generation, which sets none, passes whole."""
        if self._learned_positions is None:
            return None
        return (inputs[0][self._learned_positions],)

    def create_model_card(self, *args, **kwargs) -> None:
        """None: TRL would write a README.md of its own into the user's output folder."""

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "labels", "seq_lengths", "source"]

    def _get_train_sampler(self, train_dataset=None) -> Sampler[int]:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        grouped = self.args.train_sampling_strategy == "group_by_length"
        return LongestFirstSampler(self, self.train_dataset["length"], seed, grouped)

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
            found, is_apart = str(error).partition(". ")[0], False
        else:
            moved, rounding = self.accelerator.gather(torch.tensor([[moved, rounding]], device=self.args.device)).amax(
                0
            )
            found = f"when one changes, the states of the others move by {max(moved, rounding):.2g} of their spread"
            largest = max(LARGEST_MOVE, ROUNDING_MARGIN * rounding)
            is_apart = not (moved > largest or max(moved, rounding) > LARGEST_ROUNDING)
        if not is_apart:
            raise UserError(
                f"the {texts.name}s of a row see each other in this model "
                f"({self.model.config.model_type}: {found}); {texts.remedy}"
            )
        logger.info(f"checked with three texts in a row: a {texts.name} sees itself alone ({found})")

    def _states_of(self, model: torch.nn.Module, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """[rows, length, hidden] states that the head gets for a row of texts, as this run lays out its batches.

        Twice the row where batches have several: some attention kernels keep the texts of a single one apart.
        """
        ids = [token_id for text in texts for token_id in text]
        row = {"input_ids": ids, "labels": ids, "seq_lengths": [len(text) for text in texts], "source": ""}
        n_rows = 1 if self.data_collator.collate.padding_free else 2
        if max(self.args.train_batch_size, self.args.eval_batch_size) == 1:
            n_rows = 1
        inputs = self._prepare_inputs(self.data_collator([row] * n_rows))
        for name in ("sources", "n_tokens", "labels"):
            del inputs[name]
        states: list[torch.Tensor] = []
        head = self.model.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
        # Dropout is as in training, but the same each time, and training goes on with its own random numbers.
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(0)
            # Not what torch.compile has made of the model: it would compile once more for this length.
            (model if self.is_deepspeed_enabled else self.model)(**inputs, use_cache=False)
        handle.remove()
        return states[0]

    def _forward_learned(self, model, inputs: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """losses [learned], hits [learned], learned [batch, length - 1]: which position predicts a learned token."""
        if self._texts_to_check:
            self._check_texts_of_row(model, self._texts_to_check)
            self._texts_to_check = None
        labels = inputs.pop("labels")
        learned = labels[:, 1:] != IGNORED_LABEL
        self._learned_positions = F.pad(learned, (0, 1), value=False)
        try:
            logits = model(**inputs, use_cache=False).logits
        finally:
            self._learned_positions = None
        smoothing = self.args.label_smoothing_factor if model.training else 0.0
        losses, hits = token_losses(logits, labels[:, 1:][learned], smoothing)
        return losses, hits, learned

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean loss over the learned tokens of the whole step, all processes and micro-batches together.

        Raises UserError with the step and the records where nothing is learned.
        """
        assert not return_outputs, "evaluation goes through prediction_step and keeps no logits"
        sources, n_tokens = inputs.pop("sources"), inputs.pop("n_tokens")
        losses, hits, _ = self._forward_learned(model, inputs)
        loss_sum = losses.sum()
        if len(losses) == 0:
            raise UserError(f"step {self.state.global_step + 1}: no token to learn in {', '.join(sources)}")
        self._window["n_tokens"] += n_tokens * self.args.world_size
        self._window["n_hits"] += hits.sum()
        self._window["n_learned"] += len(losses)
        if num_items_in_batch is None:
            return loss_sum / len(losses)
        loss = loss_sum / num_items_in_batch
        # DDP averages gradients over processes, num_items_in_batch counts the tokens of all of them.
        return loss * self.accelerator.num_processes if self.args.average_tokens_across_devices else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """[batch, 3] sums of loss, hits and learned tokens, an example a row, instead of logits."""
        inputs = self._prepare_inputs(inputs)
        inputs.pop("sources")
        inputs.pop("n_tokens")
        with torch.no_grad(), self.compute_loss_context_manager():
            losses, hits, learned = self._forward_learned(model, inputs)
        statistics = torch.zeros(*learned.shape, 3, device=learned.device)
        statistics[learned] = torch.stack([losses, hits.float(), torch.ones_like(losses)], dim=-1)
        statistics = statistics.sum(dim=1)
        return None, statistics, statistics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log, with tokens a second and accuracy on learned tokens since the log before."""
        if "loss" in logs:
            window, now = self._window, time.monotonic()
            logs["token_accuracy"] = float(window["n_hits"]) / max(window["n_learned"], 1)
            logs["tokens_per_second"] = round(window["n_tokens"] / max(now - window["start"], 1e-9), 1)
            self._window = {"n_tokens": 0, "n_hits": 0, "n_learned": 0, "start": now}
        Trainer.log(self, logs, start_time)
