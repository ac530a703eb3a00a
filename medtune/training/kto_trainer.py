"""The KTO loss: a policy learns from single replies that are marked as good or bad ones."""

import math

import torch
from datasets import Dataset, concatenate_datasets

from medtune.errors import UserError
from medtune.training.preference_arguments import PreferenceConfig
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


# ---------------------------------------------------------------- data


def with_mismatched_replies(dataset: Dataset, flag: str) -> Dataset:
    """The rows, each with the reply to the next prompt that is another one in `mismatched_ids`.

    So the estimate depends neither on batches nor on processes. Raises UserError, which begins with `flag`, where all
    prompts are the same.
    """
    prompts, replies = dataset["prompt_ids"][:], dataset["reply_ids"][:]
    n_rows = len(prompts)
    partner = next((index for index in range(n_rows) if prompts[index] != prompts[-1]), None)
    if partner is None:
        raise UserError(f"{flag}: KTO sets replies against other prompts, and these {n_rows} have the same; add others")
    partners = [partner]
    for index in reversed(range(n_rows - 1)):
        partner = index + 1 if prompts[index + 1] != prompts[index] else partner
        partners.append(partner)
    mismatched = [replies[partner] for partner in reversed(partners)]
    lengths = [
        len(prompt) + max(len(reply), len(other))
        for prompt, reply, other in zip(prompts, replies, mismatched, strict=True)
    ]
    columns = Dataset.from_dict({"mismatched_ids": mismatched, "length": lengths})
    return concatenate_datasets([dataset.remove_columns("length"), columns], axis=1)


# ---------------------------------------------------------------- trainer


class KTOTrainer(PreferenceTrainer):
    """Trainer on rows of `prompt_ids`, `reply_ids` and `is_desirable`; needs `FeedbackCollator` as its collator."""

    columns = ("prompt_ids", "reply_ids", "mismatched_ids", "is_desirable", "ref_logps", "ref_mismatched_logps")
    ids_columns = ("prompt_ids", "reply_ids", "mismatched_ids")
    ref_columns = ("ref_logps", "ref_mismatched_logps")
    row_kind = "replies"

    def __init__(
        self,
        model: torch.nn.Module,
        args: PreferenceConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        **kwargs,
    ):
        train_dataset = with_mismatched_replies(train_dataset, "--train_file_dir")
        if eval_dataset is not None:
            eval_dataset = with_mismatched_replies(eval_dataset, "--validation_file_dir")
        super().__init__(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)

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
