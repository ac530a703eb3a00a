"""The KTO loss: a policy learns from single replies that are marked as good or bad ones."""

import math

import torch

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
    """Trainer on rows of `FeedbackEncoder`; needs `FeedbackCollator` as its collator."""

    columns = ("prompt_ids", "reply_ids", "mismatched_ids", "is_desirable", "ref_logps", "ref_mismatched_logps")
    ids_columns = ("prompt_ids", "reply_ids", "mismatched_ids")
    ref_columns = ("ref_logps", "ref_mismatched_logps")
    row_kind = "replies"

    def losses_and_figures(
        self, model: torch.nn.Module, batch: dict, ref_logps: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """[rows] losses, and what the log shows the means of, [rows] each; nan where a row has none.

        ref_logps: [2 x rows], of the replies and then of the mismatched ones.
        """
        args, is_desirable = self.args, batch["is_desirable"]
        n_rows = len(is_desirable)
        matched, mismatched = (
            {name: batch[name][rows] for name in ("input_ids", "attention_mask", "reply_mask")}
            for rows in (slice(n_rows), slice(n_rows, None))
        )
        with torch.no_grad():
            mismatched_ratios = self.reply_logps(model, mismatched) - ref_logps[n_rows:]
        kl = mismatched_kl(self.accelerator.gather(mismatched_ratios))
        logps = self.reply_logps(model, matched)
        ratios = logps - ref_logps[:n_rows]
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
            "kl": kl.expand(n_rows),
        }
