"""What is measured of replies and in updates, by name, and the means under the names of the log."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch

from medtune.rl.ppo_math import SumOverProcesses, k3
from medtune.rl.rewards import REWARD_MODEL, Rewards
from medtune.rl.rollout import PolicyReplies, Rollout


@dataclass(kw_only=True)
class ReplyMeasures:
    """Measures of N replies, [N] float64 each, on the CPU; KL and entropies are sums over a reply's tokens, in nats.

    ended: 1 if the reply has an end token.
    surprise: surprisal minus entropy; variance: its variance under the policy.
    kl_k3: from the reference, never negative; 0 without one.
    """

    ended: torch.Tensor
    n_tokens: torch.Tensor
    entropy: torch.Tensor
    surprise: torch.Tensor
    variance: torch.Tensor
    kl_k3: torch.Tensor

    @classmethod
    def of(cls, rollout: PolicyReplies) -> Self:
        return cls(**{name: values.double().cpu() for name, values in cls.columns(rollout).items()})

    @classmethod
    def columns(cls, rollout: PolicyReplies) -> dict[str, torch.Tensor]:
        ref_logps = rollout.policy_logps if rollout.ref_logps is None else rollout.ref_logps
        return {
            "ended": rollout.ended,
            "n_tokens": rollout.mask.sum(dim=1),
            "entropy": sum_of_tokens(rollout, rollout.entropies),
            "surprise": sum_of_tokens(rollout, -rollout.policy_logps - rollout.entropies),
            "variance": sum_of_tokens(rollout, rollout.variances),
            "kl_k3": sum_of_tokens(rollout, k3(rollout.policy_logps, ref_logps)),
        }

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        names = [spec.name for spec in fields(cls)]
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

    def first(self, n: int) -> Self:
        return type(self)(**{name: values[:n] for name, values in vars(self).items()})


def sum_of_tokens(rollout: PolicyReplies, values: torch.Tensor) -> torch.Tensor:
    """[N] sums of [N, T] values over the tokens of each reply."""
    return (values * rollout.mask).sum(dim=1)


@dataclass(kw_only=True)
class EpisodeMeasures(ReplyMeasures):
    """PPO's: [N] scores besides, before the penalty for a missing end token, and the [N, K] rewards that they sum up;
    kl: k1, the reply's log-ratio."""

    scores: torch.Tensor
    rewards: torch.Tensor
    kl: torch.Tensor

    @classmethod
    def columns(cls, rollout: Rollout) -> dict[str, torch.Tensor]:
        kl = sum_of_tokens(rollout, rollout.policy_logps - rollout.ref_logps)
        return super().columns(rollout) | {"scores": rollout.scores, "rewards": rollout.rewards, "kl": kl}

    def judged(self) -> Self:
        """Without the replies that the judge could not judge."""
        return type(self)(**{name: values[~self.scores.isnan()] for name, values in vars(self).items()})


@dataclass(kw_only=True)
class GroupMeasures(ReplyMeasures):
    """GRPO's: [N, K] rewards besides, of K kinds; the replies in the order of their episodes, group by group."""

    rewards: torch.Tensor

    @classmethod
    def of(cls, rollout: PolicyReplies, rewards: torch.Tensor) -> Self:
        columns = cls.columns(rollout) | {"rewards": rewards}
        return cls(**{name: values.double().cpu() for name, values in columns.items()})

    @classmethod
    def interleave(cls, parts: Sequence[Self]) -> Self:
        """The parts of n processes, each of which has every n-th episode, in the order of the episodes."""
        names = [spec.name for spec in fields(cls)]
        return cls(**{name: torch.stack([getattr(p, name) for p in parts], dim=1).flatten(0, 1) for name in names})


def summarize_replies(measures: ReplyMeasures) -> dict[str, float]:
    """The means over replies, and over tokens, that all stages log."""
    return {
        "objective/entropy": (measures.entropy.sum() / measures.n_tokens.sum()).item(),
        "reply/mean_len": measures.n_tokens.mean().item(),
        "reply/eos_frac": measures.ended.mean().item(),
    }


def summarize_rewards(rewards: torch.Tensor, names: Sequence[str]) -> dict[str, float]:
    """Mean and standard deviation of each of K [N, K] rewards under the names of the log."""
    figures = {}
    for name, column in zip(names, rewards.T, strict=True):
        figures |= {f"reward/{name}": column.mean().item(), f"reward/{name}_std": column.std(correction=0).item()}
    return figures


def summarize(
    measures: EpisodeMeasures, rewards: Rewards, kl_coef: float, missing_eos_penalty: float
) -> dict[str, float]:
    """The means over replies under the names of the log; of a reward model alone, which is the score, no reward's."""
    penalized = measures.scores - missing_eos_penalty * (1 - measures.ended)
    figures = {} if rewards.names == (REWARD_MODEL,) else summarize_rewards(measures.rewards, rewards.names)
    return figures | {
        "objective/score": measures.scores.mean().item(),
        "objective/score_std": measures.scores.std(correction=0).item(),
        "objective/kl": measures.kl.mean().item(),
        "objective/kl_k3": measures.kl_k3.mean().item(),
        "objective/rlhf_reward": (penalized - kl_coef * measures.kl).mean().item(),
        **summarize_replies(measures),
    }


def summarize_groups(
    measures: GroupMeasures, totals: torch.Tensor, learns: torch.Tensor, names: Sequence[str], has_reference: bool
) -> dict[str, float]:
    """GRPO's means over replies under the names of the log.

    Args:
        totals: [N] weighted sums of the rewards; learns: [N] bool, in a group with a signal.
        names: of the K rewards.
    """
    figures = {"objective/reward": totals.mean().item(), "objective/reward_std": totals.std(correction=0).item()}
    figures |= summarize_rewards(measures.rewards, names)
    n_tokens = measures.n_tokens.sum()
    figures |= {"objective/token_kl": (measures.kl_k3.sum() / n_tokens).item()} if has_reference else {}
    return figures | {"groups/no_signal_frac": 1 - learns.double().mean().item()} | summarize_replies(measures)


class TokenMeans:
    """Means over the tokens of replies, of all processes together, by name."""

    def __init__(self, sum_over_processes: SumOverProcesses):
        self.sum_over_processes = sum_over_processes
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, mask: torch.Tensor, columns: dict[str, torch.Tensor]) -> None:
        """Add [B, T] columns, at the tokens where the mask is True; the names must be the same at every call."""
        for name, column in (columns | {"tokens": mask}).items():
            total = (column.detach() * mask).sum().double()
            self.sums[name] = self.sums[name] + total if name in self.sums else total

    def means(self) -> dict[str, float]:
        totals = self.sum_over_processes(torch.stack([*self.sums.values()])).tolist()
        by_name = dict(zip(self.sums, totals, strict=True))
        n_tokens = by_name.pop("tokens")
        return {name: total / n_tokens for name, total in by_name.items()}
