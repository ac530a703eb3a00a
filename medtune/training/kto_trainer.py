"""The KTO loss: a policy learns from single replies that are marked as good or bad ones."""

import math
from collections.abc import Sequence

import torch
from datasets import Dataset

from medtune.errors import UserError
from medtune.training.preference_trainer import PreferenceTrainer

# ---------------------------------------------------------------- loss


def kto_losses(
    ratios: torch.Tensor,
    is_desirable: torch.Tensor,
    kl: torch.Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """[rows] losses: of a good reply desirable_weight x (1 - sigmoid(beta x (ratio - KL))), of a bad one
    undesirable_weight x (1 - sigmoid(beta x (KL - ratio))).

    Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, equations 7 and 8.

    Args:
        ratios: [rows] log p(y|x) - log p_ref(y|x) of the replies, in nats.
        is_desirable: [rows] bool.
        kl: a scalar, of `mismatched_kl`.
    """
    weights = torch.where(is_desirable, desirable_weight, undesirable_weight)
    return weights * (1 - torch.sigmoid(beta * torch.where(is_desirable, ratios - kl, kl - ratios)))


def mismatched_kl(mismatched_ratios: torch.Tensor) -> torch.Tensor:
    """A scalar without gradient: max(0, the mean log-ratio in nats), the estimate of KL(policy || reference).

    mismatched_ratios: [rows] of replies to other prompts than their own, of all processes (section 4.1 of the paper).
    """
    return mismatched_ratios.detach().mean().clamp(min=0)


# ---------------------------------------------------------------- trainer


class KTOTrainer(PreferenceTrainer):
    """Trainer on rows of `FeedbackEncoder`; needs `FeedbackCollator` as its collator.

    The KL term is that of all rows of a step or of an evaluation, however they are cut into batches.
    """

    columns = ("prompt_ids", "reply_ids", "mismatched_ids", "is_desirable", "ref_logps", "ref_mismatched_logps")
    ids_columns = ("prompt_ids", "reply_ids", "mismatched_ids")
    ref_columns = ("ref_logps", "ref_mismatched_logps")
    row_kind = "replies"
    kl: torch.Tensor | None = None

    # ------------------------------------------------------------ the KL term

    def note_step(self, batches: Sequence[dict]) -> None:
        gather = self.accelerator.gather
        self.kl = mismatched_kl(torch.cat([gather(self._ratios_of(batch)) for batch in batches]))

    def note_evaluation(self, dataset: Dataset) -> None:
        if self.is_deepspeed_enabled and self.deepspeed is None:
            raise UserError("--loss_type kto evaluates under DeepSpeed while it trains: add --do_train")
        gather = self.accelerator.gather_for_metrics  # which leaves out the rows that fill the last batch up
        was_training = self.model.training
        self.model.eval()
        ratios = [gather(self._ratios_of(batch)) for batch in self.get_eval_dataloader(dataset)]
        self.model.train(was_training)
        self.kl = mismatched_kl(torch.cat(ratios))

    def _ratios_of(self, batch: dict) -> torch.Tensor:
        with self.compute_loss_context_manager():
            return self.mismatched_ratios(self.model_wrapped, self._prepare_inputs(batch))

    @torch.no_grad()
    def mismatched_ratios(self, model: torch.nn.Module, batch: dict) -> torch.Tensor:
        """[rows] log-ratios of the mismatched replies."""
        n_rows = len(batch["is_desirable"])
        rows = {name: batch[name][n_rows:] for name in ("input_ids", "attention_mask", "reply_mask")}
        ref_logps = batch["ref_logps"][n_rows:] if "ref_logps" in batch else self.reference.logps(rows)
        return self.reply_logps(model, rows) - ref_logps

    # ------------------------------------------------------------ loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, self.matched(inputs), return_outputs, num_items_in_batch)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        return super().prediction_step(model, self.matched(inputs), prediction_loss_only, ignore_keys)

    def matched(self, batch: dict) -> dict:
        """The rows of a batch with their own replies."""
        n_rows = len(batch["is_desirable"])
        of_both = ("input_ids", "attention_mask", "reply_mask", "ref_logps")
        return batch | {name: batch[name][:n_rows] for name in of_both if name in batch}

    def losses_and_figures(
        self, model: torch.nn.Module, batch: dict, ref_logps: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """[rows] losses, and what the log shows the means of, [rows] each; nan where a row has none.

        ref_logps: [rows], of the replies.
        """
        args, is_desirable, kl = self.args, batch["is_desirable"], self.kl
        logps = self.reply_logps(model, batch)
        ratios = logps - ref_logps
        losses = kto_losses(ratios, is_desirable, kl, args.beta, args.desirable_weight, args.undesirable_weight)
        logps, rewards = logps.detach(), args.beta * ratios.detach()
        # By how much a reward is on the right side of the KL term.
        margins = torch.where(is_desirable, 1.0, -1.0) * (rewards - args.beta * kl)
        return losses, {
            "reward_accuracy": (margins > 0).float(),
            "reward_margin": margins,
            "chosen_reward": rewards.where(is_desirable, math.nan),
            "rejected_reward": rewards.where(~is_desirable, math.nan),
            "chosen_logps": logps.where(is_desirable, math.nan),
            "rejected_logps": logps.where(~is_desirable, math.nan),
            "kl": kl.expand(len(ratios)),
        }
