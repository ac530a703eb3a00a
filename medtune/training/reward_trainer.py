"""The Bradley-Terry loss: a reward model learns to score the better reply of a pair higher."""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from transformers import EvalPrediction

from medtune.errors import UserError
from medtune.models.dropout import switch_off_dropout
from medtune.models.reward_card import write_reward_card
from medtune.models.score_heads import LastScores
from medtune.training.stage_trainer import StageTrainer, StageTrainingArguments


@dataclass
class RMTrainingArguments(StageTrainingArguments):
    learning_rate: float = field(default=1e-4, metadata={"help": "Highest learning rate."})
    disable_dropout: bool = field(
        default=False, metadata={"help": "Train without any dropout, --lora_dropout included."}
    )
    center_rewards_coefficient: float | None = field(
        default=None, metadata={"help": "How strongly the scores of a pair are pulled to a sum of 0, such as 0.01."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.label_smoothing_factor:
            raise UserError("--label_smoothing_factor: the loss of pairs has no labels to smooth; leave it out")


# ---------------------------------------------------------------- loss


def bradley_terry_losses(
    chosen_scores: torch.Tensor, rejected_scores: torch.Tensor, margins: torch.Tensor, centering: float | None = None
) -> torch.Tensor:
    """[pairs] losses -log sigmoid(chosen - rejected - margin) + centering x (chosen + rejected)^2 of [pairs] scores.

    Bradley and Terry 1952; Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, equation 1; margins: Touvron et al.
    2023, https://arxiv.org/abs/2307.09288, equation 2; centering: Eisenstein et al. 2023,
    https://arxiv.org/abs/2312.09244, equation 2.
    """
    losses = -F.logsigmoid(chosen_scores - rejected_scores - margins)
    return losses + centering * (chosen_scores + rejected_scores) ** 2 if centering else losses


def pair_statistics(prediction: EvalPrediction) -> dict[str, float]:
    """Evaluation metrics from [pairs, 5] of loss, both scores (chosen, rejected) and both replies' lengths.

    `accuracy` is the share of pairs whose chosen reply scores higher; `longer_wins` is the accuracy of always
    preferring the longer reply, where equal lengths count half. A metric without pairs is left out.
    """
    losses, chosen, rejected, chosen_length, rejected_length = prediction.predictions.astype("float64").T
    right = chosen > rejected
    metrics = {"loss": losses.mean(), "accuracy": right.mean(), "margin": (chosen - rejected).mean()}
    for name, which in (
        ("accuracy_rejected_longer", rejected_length > chosen_length),
        ("accuracy_rejected_shorter", rejected_length < chosen_length),
    ):
        if which.any():
            metrics[name] = right[which].mean()
    metrics["longer_wins"] = (0.5 + 0.5 * np.sign(chosen_length - rejected_length)).mean()
    metrics |= {"mean_score": (chosen + rejected).mean() / 2, "pairs": len(right)}
    return {name: float(value) for name, value in metrics.items()}


# ---------------------------------------------------------------- trainer


class RewardTrainer(StageTrainer):
    """Trainer on rows of pairs with a `margin`; needs `PairCollator` as its collator."""

    columns = ("prompt_ids", "chosen_ids", "rejected_ids", "margin")
    rows_share_prompts = True

    def __init__(self, model: torch.nn.Module, args: RMTrainingArguments, **kwargs):
        if args.disable_dropout:
            switch_off_dropout(model)
        super().__init__(model=model, args=args, compute_metrics=pair_statistics, **kwargs)
        self.last_scores = LastScores(self.model)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            write_reward_card(output_dir or self.args.output_dir, self.model)

    def _losses_and_scores(self, model, inputs: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[pairs] float32 each: losses, scores of the chosen and of the rejected replies."""
        chosen, rejected = self.last_scores(model, inputs, self.layout).chunk(2)
        centering = self.args.center_rewards_coefficient
        losses = bradley_terry_losses(chosen, rejected, inputs["margin"], centering)
        return losses, chosen.detach(), rejected.detach()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean loss over the pairs of the whole step, all processes and micro-batches together."""
        assert not return_outputs, "evaluation goes through prediction_step"
        losses, chosen, rejected = self._losses_and_scores(model, inputs)
        self.note_figures(inputs["attention_mask"].sum(), accuracy=chosen > rejected, margin=chosen - rejected)
        return self.mean_over_step(losses, num_items_in_batch)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """[pairs, 5] for `pair_statistics`, instead of logits."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            columns = self._losses_and_scores(model, inputs)
        statistics = torch.stack([*columns, *inputs["reply_mask"].sum(dim=1).chunk(2)], dim=1)
        return None, statistics, statistics
