"""Losses of preferences between two replies, with a reference (DPO and its kin) or without one (ORPO, SimPO).

Of a reply y to a prompt x with log-prob log p(y|x) under the policy, its log-ratio is log p(y|x) - log p_ref(y|x).
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, concatenate_datasets
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel

from medtune.models.dropout import switch_off_dropout
from medtune.models.logps import SparseHead
from medtune.training.preference_arguments import PreferenceConfig
from medtune.training.reference import LogpsStore, Reference, copy_adapter
from medtune.training.stage_trainer import StageTrainer

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


def sft_losses(chosen_logps: torch.Tensor, mean_length: torch.Tensor | float) -> torch.Tensor:
    """[pairs] losses -log p(chosen) / mean_length, whose mean over pairs is the cross entropy a token.

    chosen_logps: [pairs] in nats; mean_length: tokens of a chosen reply, on average over all pairs of the mean.
    """
    return -chosen_logps / mean_length


# ---------------------------------------------------------------- losses without one


def orpo_losses(chosen_means: torch.Tensor, rejected_means: torch.Tensor, beta: float) -> torch.Tensor:
    """[pairs] losses -beta x log sigmoid(log(odds(chosen) / odds(rejected))), odds(y) = p / (1 - p), p = e^mean.

    To be added to the cross entropy on prompt and chosen reply. Hong et al. 2024, https://arxiv.org/abs/2403.07691,
    equations 4 and 7.

    Args:
        chosen_means, rejected_means: [pairs] mean log-probs a token, in nats, below 0.
    """

    def log_odds(means: torch.Tensor) -> torch.Tensor:
        means = means.clamp(max=-torch.finfo(means.dtype).eps)  # where p is 1 the odds are infinite
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
    rows_share_prompts = True
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
        if args.has_reference and continues_adapter:
            copy_adapter(model)
        # The reference passes through the same model: with dropout it would differ from the policy by chance.
        switch_off_dropout(model)
        super().__init__(model=model, args=args, compute_metrics=self._statistics, **kwargs)
        self.head = SparseHead(self.model, self.splits_weights, self.router_loss_weight > 0)
        self.reference = Reference(reference, self.model, self.head, self.accelerator, ref_model)
        self.start_is_checked = not args.has_reference
        self.sample = sample
        self.sampled: dict[str, float] = {}
        self.mean_sft_length: torch.Tensor | float = 1.0
        if args.precompute_ref_log_probs:
            self._precompute(ref_logps_dir, overwrite_ref_logps)

    def _precompute(self, folder: Path, overwrite: bool) -> None:
        """Give the rows the reference's log-probs, before the policy is trained."""
        args = self.args
        store = LogpsStore(folder, f"bf16 {args.bf16} fp16 {args.fp16} ", overwrite, self.reference)
        self.choose_layout_once(self.reference.model)
        for part in ("train", "eval"):
            dataset: Dataset | None = getattr(self, f"{part}_dataset")
            if dataset is None:
                continue
            size = args.precompute_ref_batch_size or getattr(args, f"per_device_{part}_batch_size")
            batches = DataLoader(dataset, size, collate_fn=self.data_collator)
            what = f"{len(dataset)} {part} {self.row_kind}"
            logps = store.logps(dataset.select_columns(list(self.ids_columns)), batches, what)
            columns = Dataset.from_dict(dict(zip(self.ref_columns, logps.T, strict=True)))
            setattr(self, f"{part}_dataset", concatenate_datasets([dataset, columns], axis=1))

    # ------------------------------------------------------------ what a loss has to know of all rows

    def _get_num_items_in_batch(self, batch_samples: list[dict], device: torch.device) -> torch.Tensor:
        if batch_samples:
            self.note_step(batch_samples)
        return super()._get_num_items_in_batch(batch_samples, device)

    def note_step(self, batches: Sequence[dict]) -> None:
        """Before a step, from all its micro-batches: a loss must not depend on how a step is cut into them."""
        lengths = torch.cat([self._sft_mask(batch).sum(dim=1) for batch in batches]).double()
        sums = torch.stack([lengths.sum(), torch.tensor(float(len(lengths))).double()]).to(self.args.device)
        total, n_pairs = self.accelerator.gather(sums[None]).sum(dim=0)
        self.mean_sft_length = (total / n_pairs).float()

    def note_evaluation(self, dataset: Dataset) -> None:
        """The same before an evaluation, of all its rows."""
        lengths = [len(ids) for ids in dataset["chosen_ids"]]
        if self.args.loss_type == ["orpo"]:
            lengths = [n + len(ids) - 1 for n, ids in zip(lengths, dataset["prompt_ids"], strict=True)]
        self.mean_sft_length = sum(lengths) / len(lengths)

    def _sft_mask(self, batch: dict) -> torch.Tensor:
        """[pairs, length - 1] True on the tokens under the cross entropy, in ORPO those of the prompt too."""
        mask = batch["attention_mask"] if self.args.loss_type == ["orpo"] else batch["reply_mask"]
        return mask[: len(mask) // 2, 1:].bool()

    # ------------------------------------------------------------ loss

    def reply_logps(self, model: torch.nn.Module, batch: dict) -> torch.Tensor:
        """[rows] log-probs in nats of the replies under the policy."""
        mask = batch["reply_mask"][:, 1:]
        return self.token_logps(model, batch, mask).sum(dim=1)

    def token_logps(self, model: torch.nn.Module, batch: dict, mask: torch.Tensor) -> torch.Tensor:
        """[rows, length - 1] log-probs in nats of the mask's tokens under the policy."""
        return self.head.logps(model, batch["input_ids"], batch["attention_mask"], mask, self.layout)

    def losses_and_figures(
        self, model: torch.nn.Module, batch: dict, ref_logps: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """[pairs] losses, and what the log shows the means of, [pairs] each.

        ref_logps: [2 x pairs], of the chosen replies and then of the rejected ones.
        """
        args, is_reply = self.args, batch["reply_mask"][:, 1:]
        n_pairs, lengths = len(is_reply) // 2, is_reply.sum(dim=1)
        scored = torch.cat([self._sft_mask(batch), is_reply[n_pairs:]])
        by_token = self.token_logps(model, batch, scored)
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
                term = sft_losses(logps[:n_pairs], self.mean_sft_length)
            elif name == "orpo":
                term = orpo_losses(chosen, rejected, args.beta)
                term = term + sft_losses(by_token[:n_pairs].sum(dim=1), self.mean_sft_length)
            elif name == "simpo":
                term = simpo_losses(chosen, rejected, args.beta, args.simpo_gamma, args.label_smoothing)
            else:
                raise AssertionError(name)
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
        return batch["ref_logps"] if self.args.precompute_ref_log_probs else self.reference.logps(batch)

    def choose_layout_once(self, model: torch.nn.Module) -> None:
        super().choose_layout_once(model)
        self.reference.use_layout(self.layout)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean loss over the rows of the whole step, all processes and micro-batches together."""
        assert not return_outputs, "evaluation goes through prediction_step"
        ref_logps = self._ref_logps_of(inputs)
        if not self.start_is_checked and self.state.global_step == 0:
            self._check_start(model, inputs, ref_logps)
        self.start_is_checked = True
        losses, figures = self.losses_and_figures(model, inputs, ref_logps)
        self.note_figures(inputs["attention_mask"].sum(), **figures)
        return self.with_router_loss(self.mean_over_step(losses, num_items_in_batch))

    @torch.no_grad()
    def _check_start(self, model: torch.nn.Module, batch: dict, ref_logps: torch.Tensor) -> None:
        model.eval()
        policy_logps = self.reply_logps(model, batch)
        model.train()
        self.reference.check_start(
            policy_logps, ref_logps, batch["reply_mask"].sum(dim=1), self.args.precompute_ref_log_probs
        )

    # ------------------------------------------------------------ evaluation

    def evaluate(self, eval_dataset: Dataset | None = None, **kwargs) -> dict[str, float]:
        self.sampled = self.sample(self.model) if self.sample else {}
        self.note_evaluation(self.eval_dataset if eval_dataset is None else eval_dataset)
        return super().evaluate(eval_dataset, **kwargs)

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
