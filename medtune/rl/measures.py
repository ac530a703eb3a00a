"""What is measured of replies and in updates, by name, and the means under the names of the log."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch

from medtune.rl.ppo_math import SumOverProcesses, k3
from medtune.rl.rollout import Rollout


@dataclass(kw_only=True)
class EpisodeMeasures:
    """Measures of N replies, [N] float64 each, on the CPU; KL and entropies are sums over a reply's tokens, in nats.

    scores: centred, before the penalty for a missing end token; ended: 1 if the reply has an end token.
    kl: k1, the reply's log-ratio; kl_k3: never negative.
    surprise: surprisal minus entropy; variance: its variance under the policy.
    """

    scores: torch.Tensor
    ended: torch.Tensor
    n_tokens: torch.Tensor
    kl: torch.Tensor
    kl_k3: torch.Tensor
    entropy: torch.Tensor
    surprise: torch.Tensor
    variance: torch.Tensor

    @classmethod
    def of(cls, rollout: Rollout) -> Self:
        def sums(values: torch.Tensor) -> torch.Tensor:
            return (values * rollout.mask).sum(dim=1)

        measures = {
            "scores": rollout.scores,
            "ended": rollout.ended,
            "n_tokens": rollout.mask.sum(dim=1),
            "kl": sums(rollout.policy_logps - rollout.ref_logps),
            "kl_k3": sums(k3(rollout.policy_logps, rollout.ref_logps)),
            "entropy": sums(rollout.entropies),
            "surprise": sums(-rollout.policy_logps - rollout.entropies),
            "variance": sums(rollout.variances),
        }
        return cls(**{name: values.double().cpu() for name, values in measures.items()})

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        names = [spec.name for spec in fields(cls)]
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

    def first(self, n: int) -> Self:
        return type(self)(**{name: values[:n] for name, values in vars(self).items()})


def summarize(measures: EpisodeMeasures, kl_coef: float, missing_eos_penalty: float) -> dict[str, float]:
    """The means over replies under the names of the log."""
    penalized = measures.scores - missing_eos_penalty * (1 - measures.ended)
    return {
        "objective/score": measures.scores.mean().item(),
        "objective/score_std": measures.scores.std(correction=0).item(),
        "objective/kl": measures.kl.mean().item(),
        "objective/kl_k3": measures.kl_k3.mean().item(),
        "objective/entropy": (measures.entropy.sum() / measures.n_tokens.sum()).item(),
        "objective/rlhf_reward": (penalized - kl_coef * measures.kl).mean().item(),
        "reply/mean_len": measures.n_tokens.mean().item(),
        "reply/eos_frac": measures.ended.mean().item(),
    }


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
