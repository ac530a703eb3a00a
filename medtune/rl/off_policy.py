"""Replies that vLLM drew: how far its log-probs are from the policy's own, whether it drew from the policy at all, and
the weights that make up for the difference."""

import math
from functools import partial

import torch
from accelerate import Accelerator

from medtune.rl.arguments import RolloutArguments
from medtune.rl.measures import TokenMeans
from medtune.rl.ppo_math import truncated_ratios
from medtune.rl.roles import Roles
from medtune.rl.rollout import PolicyReplies
from medtune.rl.vllm_servers import ServerError

# Two engines in bfloat16 differ by about 0.01 nats a token, a policy on a 4-bit base and a server with it whole by 0.1.
TOO_FAR = 0.5
# The rows of a process on which it is compared with the base alone; how much nearer a server must be to that.
CHECKED_ROWS = 4
CLEARLY_NEARER = 1.5


def sampler_weights(replies: PolicyReplies, cap: float) -> torch.Tensor | float:
    """[B, T] factors of the policy's losses: `truncated_ratios` of tokens that vLLM drew; 1 for our own, or without a
    cap."""
    if replies.sampler_logps is None or not cap:
        return 1.0
    return truncated_ratios(replies.policy_logps, replies.sampler_logps, cap)


@torch.no_grad()
def check_sampler(
    accelerator: Accelerator, roles: Roles, replies: PolicyReplies, args: RolloutArguments
) -> dict[str, float]:
    """Figures on the tokens that vLLM drew, over all processes; none where the replies are our own.

    Raises ServerError, in all processes, if they were not drawn from the policy.
    """
    if replies.sampler_logps is None:
        return {}
    sum_over_processes = partial(accelerator.reduce, reduction="sum")
    means, first_means = TokenMeans(sum_over_processes), TokenMeans(sum_over_processes)
    diff = (replies.policy_logps - replies.sampler_logps).abs()
    ratio = truncated_ratios(replies.policy_logps, replies.sampler_logps, args.vllm_is_cap or math.inf)
    means.add(replies.mask, {"diff": diff, "ratio": ratio})
    first = replies.take(range(min(CHECKED_ROWS, len(replies.ids))))
    with accelerator.autocast():
        base_logps = roles.base_logps(first.ids, first.attention_mask, first.mask, args.temperature)
    of_first = {"policy": first.policy_logps, "base": base_logps}
    first_means.add(first.mask, {name: (logps - first.sampler_logps).abs() for name, logps in of_first.items()})
    mean, nearer = means.means(), first_means.means()
    if nearer["policy"] > CLEARLY_NEARER * nearer["base"]:
        raise ServerError(
            f"--vllm_url: the replies are the base model's without the adapter: their log-probs differ from its own by "
            f"{nearer['base']:.2g} nats a token and from the policy's by {nearer['policy']:.2g}; a server ignores the "
            "adapter it took"
        )
    if not mean["diff"] <= TOO_FAR:
        raise ServerError(
            f"--vllm_url: the replies are not drawn from the policy: their log-probs differ by {mean['diff']:.2g} nats "
            "a token from its own; a server has other weights than the policy's base, or changes its probabilities"
        )
    return {"sampler/logp_diff": mean["diff"], "sampler/is_ratio": mean["ratio"]}
