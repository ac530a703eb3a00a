"""Losses of preferences between two replies, with a reference (DPO and its kin) or without one (ORPO, SimPO).

Of a reply y to a prompt x with log-prob log p(y|x) under the policy, its log-ratio is log p(y|x) - log p_ref(y|x).
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, concatenate_datasets
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel

from medtune.errors import UserError
from medtune.models.logps import SparseHead, log_probs
from medtune.training.reference import (
    as_reference,
    check_start,
    copy_adapter,
    engine_of_reference,
    reference_fingerprint,
    rows_fingerprint,
    stored_logps,
)
from medtune.training.stage_trainer import StageTrainer, StageTrainingArguments, switch_off_dropout

# ---------------------------------------------------------------- losses with a reference


def sigmoid_losses(chosen_ratios: torch.Tensor, rejected_ratios: torch.Tensor, beta: float) -> torch.Tensor:
    """[pairs] losses -log sigmoid(beta x (chosen - rejected)) of [pairs] log-ratios in nats.

    Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7.
    """
    return -F.logsigmoid(beta * (chosen_ratios - rejected_ratios))


def hinge_losses(chosen_ratios: torch.Tensor, rejected_ratios: torch.Tensor, beta: float) -> torch.Tensor:
    """[pairs] losses max(0, 1 - beta x (chosen - rejected)) of [pairs] log-ratios in nats.

    Zhao et al. 2023, https://arxiv.org/abs/2305.10425, on log-ratios; Liu et al. 2023,
    https://arxiv.org/abs/2309.06657, equation 10.
    """
    return torch.relu(1 - beta * (chosen_ratios - rejected_ratios))


def ipo_losses(chosen_ratios: torch.Tensor, rejected_ratios: torch.Tensor, beta: float) -> torch.Tensor:
    """[pairs] losses (chosen - rejected - 1 / (2 x beta))^2 of [pairs] log-ratios in nats, each a mean over its tokens.

    Azar et al. 2023, https://arxiv.org/abs/2310.12036, equation 17, whose authors take the mean.
    """
    return (chosen_ratios - rejected_ratios - 1 / (2 * beta)) ** 2


def robust_losses(
    chosen_ratios: torch.Tensor, rejected_ratios: torch.Tensor, beta: float, label_smoothing: float
) -> torch.Tensor:
    """[pairs] losses ((1 - e) x L(chosen, rejected) - e x L(rejected, chosen)) / (1 - 2e), where L is that of DPO.

    Unbiased where a share e of the pairs is the wrong way round: Chowdhury et al. 2024,
    https://arxiv.org/abs/2403.00409, equation 12.
    """
    right, wrong = (
        sigmoid_losses(*ratios, beta) for ratios in ((chosen_ratios, rejected_ratios), (rejected_ratios, chosen_ratios))
    )
    return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)


def sft_losses(chosen_logps: torch.Tensor, chosen_lengths: torch.Tensor) -> torch.Tensor:
    """[pairs] times the mean of -log p over all tokens of the chosen replies: [pairs] log-probs and lengths."""
    return (-chosen_logps.sum() / chosen_lengths.sum()).expand(len(chosen_logps))


# ---------------------------------------------------------------- losses without one


def orpo_losses(chosen_means: torch.Tensor, rejected_means: torch.Tensor, beta: float) -> torch.Tensor:
    """[pairs] losses -beta x log sigmoid(log(odds(chosen) / odds(rejected))), odds(y) = p / (1 - p), p = e^mean.

    To be added to the cross entropy on prompt and chosen reply. Hong et al. 2024, https://arxiv.org/abs/2403.07691,
    equations 4 and 7.

    Args:
        chosen_means, rejected_means: [pairs] mean log-probs a token, in nats, below 0.
    """

    def log_odds(means: torch.Tensor) -> torch.Tensor:
        # log(1 - e^x): of the two forms the one that keeps the digits.
        near_zero = means > -math.log(2)
        return means - torch.where(
            near_zero,
            torch.log(-torch.expm1(torch.where(near_zero, means, -1.0))),
            torch.log1p(-torch.exp(torch.where(near_zero, -1.0, means))),
        )

    return -beta * F.logsigmoid(log_odds(chosen_means) - log_odds(rejected_means))


def simpo_losses(
    chosen_means: torch.Tensor, rejected_means: torch.Tensor, beta: float, gamma: float, label_smoothing: float = 0.0
) -> torch.Tensor:
    """[pairs] losses -log sigmoid(m), m = beta x (chosen - rejected) - gamma, of [pairs] mean log-probs a token.

    With smoothing e: (1 - e) x that - e x log sigmoid(-m). Meng et al. 2024, https://arxiv.org/abs/2405.14734,
    equation 6.
    """
    margins = beta * (chosen_means - rejected_means) - gamma
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)


# ---------------------------------------------------------------- arguments

DPO_LOSSES = ("sigmoid", "hinge", "ipo", "robust", "sft")
REFERENCE_FREE = ("orpo", "simpo")
UNPAIRED = ("kto",)
SMOOTHED = ("robust", "simpo")


@dataclass
class PreferenceConfig(StageTrainingArguments):
    learning_rate: float = field(default=1e-6, metadata={"help": "Highest learning rate."})
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={
            "help": f"One or several of {', '.join(DPO_LOSSES)}; or alone, without a reference, one of "
            f"{', '.join(REFERENCE_FREE)}; or kto, which learns from single replies with a label."
        },
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "A factor for each of several --loss_type; without it 1 each."}
    )
    beta: float | None = field(
        default=None,
        metadata={"help": "How closely the policy is held to the reference; 0.1 without the flag, for simpo 2."},
    )
    simpo_gamma: float = field(
        default=1.0, metadata={"help": "simpo: by how much beta x the mean log-prob of the chosen reply should lead."}
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": f"Share of pairs taken to be the wrong way; for {', '.join(SMOOTHED)}."}
    )
    desirable_weight: float = field(default=1.0, metadata={"help": "kto: how much a reply with the label true counts."})
    undesirable_weight: float = field(
        default=1.0, metadata={"help": "kto: how much a reply with the label false counts."}
    )
    precompute_ref_log_probs: bool = field(
        default=False, metadata={"help": "The reference's log-probs once before training, kept in --cache_dir."}
    )
    precompute_ref_batch_size: int | None = field(
        default=None, metadata={"help": "Rows at a time for that; the batch sizes of training and evaluation without."}
    )

    def __post_init__(self):
        if self.beta is None:
            self.beta = 2.0 if self.loss_type == ["simpo"] else 0.1
        if not self.beta > 0:
            raise UserError(
                f"--beta {self.beta:g}: it holds the policy to the reference, and without it nothing does; give a "
                "number above 0, such as 0.1"
            )
        self._check_losses()
        super().__post_init__()
        if not self.do_train and self.has_reference:
            raise UserError(
                "--do_eval without --do_train: the model would be compared with itself as the reference, and every "
                "reward would be 0; scripts/evaluate_model.py measures a trained model"
            )

    @property
    def has_reference(self) -> bool:
        return not set(self.loss_type) & set(REFERENCE_FREE)

    @property
    def is_unpaired(self) -> bool:
        return self.loss_type == ["kto"]

    @property
    def weighted_losses(self) -> dict[str, float]:
        return dict(zip(self.loss_type, self.loss_weights or [1.0] * len(self.loss_type), strict=True))

    def _check_losses(self) -> None:
        """Refuse unknown losses, and options that these losses have no use for."""
        losses, known = self.loss_type, (*DPO_LOSSES, *REFERENCE_FREE, *UNPAIRED)
        listed = " ".join(losses)
        for name in losses:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
                raise UserError(f"--loss_type {name}: not known; {hint}")
        if len(set(losses)) < len(losses):
            raise UserError(f"--loss_type {listed}: one is named twice; --loss_weights makes it count more")
        if self.loss_weights is not None and len(self.loss_weights) != len(losses):
            raise UserError(
                f"--loss_weights: {len(self.loss_weights)} for {len(losses)} losses ({listed}); give one for each"
            )
        if self.loss_weights is not None and min(self.loss_weights) <= 0:
            raise UserError(f"--loss_weights {min(self.loss_weights):g}: give numbers above 0, or leave the loss out")
        if set(losses) & {*REFERENCE_FREE, *UNPAIRED}:
            options = {
                "another --loss_type": len(losses) > 1,
                "--loss_weights": self.loss_weights is not None,
                "--precompute_ref_log_probs": self.precompute_ref_log_probs and not self.has_reference,
            }
            for option, is_given in options.items():
                if is_given:
                    why = "stands alone" if self.has_reference else "stands alone and has no reference"
                    raise UserError(f"--loss_type {listed}: it {why}; leave out {option}")
        for name in ("desirable_weight", "undesirable_weight"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name} {getattr(self, name):g}: give a number above 0, or leave those replies out")
            if getattr(self, name) != 1 and not self.is_unpaired:
                raise UserError(f"--{name}: --loss_type {listed} has no use for it; kto does")
        if self.label_smoothing_factor:
            raise UserError("--label_smoothing_factor: pairs have no labels to smooth; --label_smoothing is for them")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"--label_smoothing {self.label_smoothing:g}: give a share from 0 to below 0.5")
        if self.label_smoothing and not set(SMOOTHED) & set(losses):
            raise UserError(f"--label_smoothing: --loss_type {listed} has no use for it; {', '.join(SMOOTHED)} do")


# ---------------------------------------------------------------- trainer


class PreferenceTrainer(StageTrainer):
    """Trainer on rows of pairs, with the policy's reference; needs `PairCollator` as its collator.

    Args:
        reference: its name, for the log; "" for losses without one.
        continues_adapter: the reference is the adapter as it is now, and not the base without it.
        ref_model: the reference of full weights.
        ref_logps_dir: where log-probs computed beforehand are kept; `overwrite_ref_logps` computes them again.
        sample: is called with the model before each evaluation; the figures it returns stand in its log.
    """

    columns = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")
    ids_columns: ClassVar[tuple[str, ...]] = ("prompt_ids", "chosen_ids", "rejected_ids")
    ref_columns: ClassVar[tuple[str, ...]] = ("ref_chosen_logps", "ref_rejected_logps")
    row_kind: ClassVar[str] = "pairs"

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: PreferenceConfig,
        *,
        reference: str = "",
        continues_adapter: bool = False,
        ref_model: PreTrainedModel | None = None,
        ref_logps_dir: Path | None = None,
        overwrite_ref_logps: bool = False,
        sample: Callable[[torch.nn.Module], dict[str, float]] | None = None,
        **kwargs,
    ):
        # The reference passes through the same model: with dropout it would differ from the policy by chance.
        switch_off_dropout(model)
        if args.has_reference and continues_adapter:
            copy_adapter(model)
        super().__init__(model=model, args=args, compute_metrics=self._statistics, **kwargs)
        self.reference, self.sample = reference, sample
        self.start_is_checked = not args.has_reference
        self.sampled: dict[str, float] = {}
        self.head = SparseHead(self.model, one_pass=self.splits_weights)
        self.ref_model, self.ref_head = ref_model, self.head
        if ref_model is not None:
            switch_off_dropout(ref_model)
            self.ref_head = SparseHead(ref_model, one_pass=self.splits_weights)
        key = ""
        if args.precompute_ref_log_probs and self.accelerator.is_main_process:
            key = f"bf16 {args.bf16} fp16 {args.fp16} {reference_fingerprint(ref_model or self.model)}"
        if ref_model is not None and self.is_deepspeed_enabled:
            self.ref_model = engine_of_reference(ref_model, self.accelerator)
        elif ref_model is not None:
            self.ref_model = self.accelerator.prepare_model(ref_model, evaluation_mode=True)
        if args.precompute_ref_log_probs:
            self._precompute(ref_logps_dir, key, overwrite_ref_logps)

    # ------------------------------------------------------------ log-probs

    def token_logps(self, model: torch.nn.Module, head: SparseHead, batch: dict, mask: torch.Tensor) -> torch.Tensor:
        """[rows, length - 1] float32 log-probs in nats of the tokens from the second on; 0 outside the mask.

        mask: [rows, length - 1] bool.
        """
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        ids = batch["input_ids"][:, 1:][mask]
        (logps,) = head(model, inputs, F.pad(mask, (0, 1), value=False), ids, log_probs)
        return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, logps)

    def reply_logps(self, model: torch.nn.Module, batch: dict) -> torch.Tensor:
        """[rows] log-probs in nats of the replies under the policy."""
        return self.token_logps(model, self.head, batch, batch["reply_mask"][:, 1:]).sum(dim=1)

    @torch.no_grad()
    def ref_logps(self, batch: dict, model: torch.nn.Module | None = None) -> torch.Tensor:
        """[rows] log-probs in nats of the replies under the reference; `model` where the policy is in an engine."""
        mask = batch["reply_mask"][:, 1:]
        if self.ref_model is not None or not isinstance(self.model, PeftModel):
            model = self.ref_model or model or self.model
            return self.token_logps(model, self.ref_head, batch, mask).sum(dim=1)
        was_training = self.model.training
        self.model.eval()  # so that gradient checkpointing does not warn of missing gradients
        with as_reference(self.model):
            logps = self.token_logps(model or self.model, self.head, batch, mask).sum(dim=1)
        self.model.train(was_training)
        return logps

    def _precompute(self, folder: Path, key: str, overwrite: bool) -> None:
        """Give the rows the reference's log-probs, before the policy is trained."""
        engine = None
        if self.is_deepspeed_enabled and self.ref_model is None:
            engine = engine_of_reference(self.model, self.accelerator)  # DeepSpeed has not placed the model yet
        for part in ("train", "eval"):
            dataset: Dataset | None = getattr(self, f"{part}_dataset")
            if dataset is None:
                continue
            size = self.args.precompute_ref_batch_size or getattr(self.args, f"per_device_{part}_batch_size")
            what = f"{len(dataset)} {part} {self.row_kind}"
            of_rows = key + rows_fingerprint(dataset, self.ids_columns)
            compute = partial(self._all_ref_logps, dataset, size, engine)
            logps = stored_logps(folder, of_rows, overwrite, what, compute, self.accelerator)
            assert logps.shape == (len(dataset), 2), (logps.shape, len(dataset))
            columns = Dataset.from_dict(dict(zip(self.ref_columns, logps.T, strict=True)))
            setattr(self, f"{part}_dataset", concatenate_datasets([dataset, columns], axis=1))

    def _all_ref_logps(self, dataset: Dataset, batch_size: int, engine: torch.nn.Module | None) -> np.ndarray:
        """[rows, 2] float32: the reference's log-probs of the two replies of a row."""
        parts = []
        for batch in self.accelerator.prepare(DataLoader(dataset, batch_size, collate_fn=self.data_collator)):
            with self.accelerator.autocast():
                logps = self.ref_logps(batch, engine)
            parts.append(self.accelerator.gather_for_metrics(torch.stack(logps.chunk(2), dim=1)).float().cpu())
        return torch.cat(parts).numpy()

    # ------------------------------------------------------------ loss

    def losses_and_figures(
        self, model: torch.nn.Module, batch: dict, ref_logps: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """[pairs] losses, and what the log shows the means of, [pairs] each.

        ref_logps: [2 x pairs], of the chosen replies and then of the rejected ones.
        """
        args, is_reply = self.args, batch["reply_mask"][:, 1:]
        n_pairs, lengths, scored = len(is_reply) // 2, is_reply.sum(dim=1), is_reply
        if args.loss_type == ["orpo"]:  # whose cross entropy is that of the chosen replies' prompts too
            scored = torch.cat([batch["attention_mask"][:n_pairs, 1:].bool(), is_reply[n_pairs:]])
        by_token = self.token_logps(model, self.head, batch, scored)
        logps = (by_token * is_reply).sum(dim=1)
        if ref_logps is None:
            logps = logps / lengths
        ratios = logps if ref_logps is None else logps - ref_logps
        chosen, rejected = ratios.chunk(2)
        losses = torch.zeros_like(chosen)
        for name, weight in args.weighted_losses.items():
            if name == "sigmoid":
                term = sigmoid_losses(chosen, rejected, args.beta)
            elif name == "hinge":
                term = hinge_losses(chosen, rejected, args.beta)
            elif name == "ipo":
                term = ipo_losses(*(ratios / lengths).chunk(2), args.beta)
            elif name == "robust":
                term = robust_losses(chosen, rejected, args.beta, args.label_smoothing)
            elif name == "sft":
                term = sft_losses(logps[:n_pairs], lengths[:n_pairs])
            elif name == "orpo":
                term = orpo_losses(chosen, rejected, args.beta)
                term = term + sft_losses(by_token[:n_pairs].sum(dim=1), scored[:n_pairs].sum(dim=1))
            else:
                term = simpo_losses(chosen, rejected, args.beta, args.simpo_gamma, args.label_smoothing)
            losses = losses + weight * term
        rewards = args.beta * ratios.detach()
        chosen_rewards, rejected_rewards = rewards.chunk(2)
        chosen_logps, rejected_logps = logps.detach().chunk(2)
        return losses, {
            "reward_accuracy": (chosen_rewards > rejected_rewards).float(),
            "reward_margin": chosen_rewards - rejected_rewards,
            "chosen_reward": chosen_rewards,
            "rejected_reward": rejected_rewards,
            "chosen_logps": chosen_logps,
            "rejected_logps": rejected_logps,
        }

    def _ref_logps_of(self, batch: dict) -> torch.Tensor | None:
        if not self.args.has_reference:
            return None
        return batch["ref_logps"] if self.args.precompute_ref_log_probs else self.ref_logps(batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean loss over the rows of the whole step, all processes and micro-batches together."""
        assert not return_outputs, "evaluation goes through prediction_step"
        ref_logps = self._ref_logps_of(inputs)
        if not self.start_is_checked and self.state.global_step == 0:
            self._check_start(model, inputs, ref_logps)
        self.start_is_checked = True
        losses, figures = self.losses_and_figures(model, inputs, ref_logps)
        self.note_figures(inputs["attention_mask"].sum(), **figures)
        return self.mean_over_step(losses, num_items_in_batch)

    @torch.no_grad()
    def _check_start(self, model: torch.nn.Module, batch: dict, ref_logps: torch.Tensor) -> None:
        model.eval()
        policy_logps = self.reply_logps(model, batch)
        model.train()
        of_all = map(self.accelerator.gather, (policy_logps, ref_logps, batch["reply_mask"].sum(dim=1)))
        check_start(*of_all, self.reference, are_stored=self.args.precompute_ref_log_probs)

    # ------------------------------------------------------------ evaluation

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        self.sampled = self.sample(self.model) if self.sample else {}
        return super().evaluate(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """[rows, figures] with the loss first, instead of logits."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            losses, figures = self.losses_and_figures(model, inputs, self._ref_logps_of(inputs))
        self.figure_names = ["loss", *figures]
        statistics = torch.stack([losses, *figures.values()], dim=1)
        return None, statistics, statistics

    def _statistics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Means over rows, and what the samples gave; a figure that no row has is left out."""
        columns = zip(self.figure_names, prediction.predictions.astype("float64").T, strict=True)
        present = {name: values[~np.isnan(values)] for name, values in columns}
        means = {name: float(values.mean()) for name, values in present.items() if len(values)}
        # A loss that is not a number is the run's fault and not a missing figure.
        return means | {"loss": float(prediction.predictions[:, 0].astype("float64").mean())} | self.sampled
