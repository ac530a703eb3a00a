"""The arithmetic of GRPO and its variants: advantages within a group, the clipped surrogate, and means over tokens.

Tensors in, tensors out. N replies in groups of G, of at most T tokens; `mask` is [B, T] bool, True on the tokens that
are learned. Of an update, which may pass through the model in several micro-batches and processes, each function gets
a part, and `Whole` says what all of it has: the parts add up to the loss.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

# Added to a group's standard deviation, as TRL does.
SCALE_EPSILON = 1e-4

# ---------------------------------------------------------------- advantages


def fill_missing(rewards: torch.Tensor, num_generations: int) -> torch.Tensor:
    """[N, K] rewards, NaN replaced by the mean of the group's others, 0 if there are none: so the others' advantages
    keep their mean of 0."""
    groups = rewards.view(-1, num_generations, rewards.shape[1])
    means = groups.nanmean(dim=1, keepdim=True).nan_to_num()
    return torch.where(groups.isnan(), means, groups).flatten(0, 1)


def group_advantages(rewards: torch.Tensor, num_generations: int, scale: bool) -> torch.Tensor:
    """[N] advantages of the replies: reward less the mean of its group, over the group's standard deviation.

    A_i = (r_i - mean(r_1..G)) / std(r_1..G) (Shao et al. 2024, https://arxiv.org/abs/2402.03300, section 4.1.2);
    without `scale` the difference alone (Liu et al. 2025, "Dr. GRPO", https://arxiv.org/abs/2503.20783, section 3.2).

    Args:
        rewards: [N], the groups one after another.
    """
    groups = rewards.view(-1, num_generations)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if scale:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + SCALE_EPSILON)
    return advantages.flatten()


def has_signal(rewards: torch.Tensor, num_generations: int) -> torch.Tensor:
    """[N] bool: whether the replies of a reply's group differ in their [N] rewards.

    Equal rewards are advantages of 0, from which nothing is learned (Yu et al. 2025, "DAPO",
    https://arxiv.org/abs/2503.14476, section 3.2).
    """
    groups = rewards.view(-1, num_generations)
    differs = groups.amax(dim=1) - groups.amin(dim=1) > 1e-6
    return differs.repeat_interleave(num_generations)


# ---------------------------------------------------------------- the surrogate of a token


def token_log_ratios(logps: torch.Tensor, old_logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B, T] log of each token's probability ratio, new policy over old (Shao et al. 2024, equation 3)."""
    return logps - old_logps


def sequence_log_ratios(logps: torch.Tensor, old_logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B, T] the reply's mean log-ratio at each of its tokens: s = (pi(y) / pi_old(y)) ^ (1 / |y|) (Zheng et al. 2025,
    "GSPO", https://arxiv.org/abs/2507.18071, equation 7)."""
    mean = ((logps - old_logps) * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    return mean[:, None].expand(mask.shape)


def surrogate_losses(
    log_ratios: torch.Tensor, advantages: torch.Tensor, epsilon: float, epsilon_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T] losses -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A), and where the clip decides (Shao et al. 2024,
    equation 3; its upper side further away in Yu et al. 2025, equation 10).

    Args:
        log_ratios: [B, T].
        advantages: [B].
    """
    ratios, advantages = log_ratios.exp(), advantages[:, None]
    free = -advantages * ratios
    clipped = -advantages * ratios.clamp(1 - epsilon, 1 + epsilon_high)
    return torch.maximum(free, clipped), clipped > free


# ---------------------------------------------------------------- from tokens to the loss


@dataclass(frozen=True)
class Whole:
    """What a whole update learns from: replies, their tokens in all, and the most tokens that a reply may have."""

    n_replies: float
    n_tokens: float
    max_tokens: int


def mean_of_tokens(losses: torch.Tensor, mask: torch.Tensor, whole: Whole) -> torch.Tensor:
    """DAPO: every token of the update counts the same, 1 / sum(|o_i|) (Yu et al. 2025, equation 8)."""
    return (losses * mask).sum() / whole.n_tokens


def mean_of_replies(losses: torch.Tensor, mask: torch.Tensor, whole: Whole) -> torch.Tensor:
    """GRPO: every reply counts the same, 1 / G sum(1 / |o_i| sum(...)) (Shao et al. 2024, equation 3)."""
    return ((losses * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum() / whole.n_replies


def sum_over_constant(losses: torch.Tensor, mask: torch.Tensor, whole: Whole) -> torch.Tensor:
    """Dr. GRPO: a constant in place of lengths, which would make long wrong replies cheap (Liu et al. 2025, section
    3.2): the longest reply allowed."""
    return (losses * mask).sum() / (whole.n_replies * whole.max_tokens)


class LossType(NamedTuple):
    """The ratio that a loss clips, and how its tokens become one number."""

    log_ratios: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    average: Callable[[torch.Tensor, torch.Tensor, Whole], torch.Tensor]


LOSS_TYPES = {
    "dapo": LossType(token_log_ratios, mean_of_tokens),
    "grpo": LossType(token_log_ratios, mean_of_replies),
    "dr_grpo": LossType(token_log_ratios, sum_over_constant),
    "gspo": LossType(sequence_log_ratios, mean_of_replies),
}
