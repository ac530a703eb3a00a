"""The arithmetic of PPO: random draws, means and whitening under a mask, log-probs, rewards, advantages, the losses.

Tensors in, tensors out. B replies of at most T tokens; `mask` is [B, T] bool, True on a reply's tokens, its end token
included; V is the vocabulary. Log-probs, KL and entropy are in nats.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from medtune.models.logps import in_chunks

# Rows of [V] logits that exist at a time.
CHUNK = 128
# Sums a tensor over all processes; one process has nothing to add.
SumOverProcesses = Callable[[torch.Tensor], torch.Tensor]


# ---------------------------------------------------------------- random draws


def episode_order(n_prompts: int, n_episodes: int, seed: int) -> list[int]:
    """The prompt index of each episode: repeated passes over all prompts, each shuffled."""
    order: list[int] = []
    for epoch in range(math.ceil(n_episodes / n_prompts)):
        generator = torch.Generator().manual_seed(seed + epoch)
        order += torch.randperm(n_prompts, generator=generator).tolist()
    return order[:n_episodes]


def episode_seed(seed: int, episode: int) -> int:
    return seed * 1_000_003 + episode


def draw_uniforms(n_tokens: int, seed: int, episode: int) -> list[float]:
    """n_tokens float64 uniform numbers of an episode."""
    generator = torch.Generator().manual_seed(episode_seed(seed, episode))
    return torch.rand(n_tokens, generator=generator, dtype=torch.float64).tolist()


def inverse_transform(logits: torch.Tensor, uniforms: Sequence[float], temperature: float) -> torch.Tensor:
    """[B] ids drawn from [B, V] logits: the first whose cumulative chance exceeds the uniform number of its row."""
    cumulative = (logits.double() / temperature).softmax(dim=-1).cumsum(dim=-1)
    drawn = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None] * cumulative[:, -1:]
    return (cumulative <= drawn).sum(dim=-1).clamp(max=logits.shape[1] - 1)


# ---------------------------------------------------------------- under a mask


def masked_whiten(
    values: torch.Tensor,
    mask: torch.Tensor,
    shift_mean: bool = True,
    sum_over_processes: SumOverProcesses = lambda tensor: tensor,
) -> torch.Tensor:
    """[B, T] values with variance 1 where the mask is True, over all processes, and 0 elsewhere.

    shift_mean: mean 0 too; otherwise the mean stays as it is.
    """
    sums = torch.stack([mask.sum().double(), (values.double() * mask).sum()])
    count, total = sum_over_processes(sums)
    mean = total / count
    variance = sum_over_processes(((values.double() - mean) ** 2 * mask).sum()) / count
    whitened = (values - mean.to(values.dtype)) * torch.rsqrt(variance + 1e-8).to(values.dtype)
    return (whitened if shift_mean else whitened + mean.to(values.dtype)) * mask


# ---------------------------------------------------------------- sequences


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """[B, L] positions that start at 0 at each row's first real token, whatever padding is before it."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def reply_mask(reply_ids: torch.Tensor, stop_ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """From [B, T] generated ids: the mask of each reply through its first stop token, and [B] whether it has one.

    Stop tokens in the prompt do not count; Qwen's template writes several there.
    """
    is_stop = torch.isin(reply_ids, torch.tensor(list(stop_ids), device=reply_ids.device))
    n_stops_before = is_stop.long().cumsum(dim=1) - is_stop.long()
    return n_stops_before == 0, is_stop.any(dim=1)


# ---------------------------------------------------------------- log-probs


def token_logps(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    temperature: float,
    is_frozen: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs of ids, entropies of their distributions and variances of the surprisal under these, without [N, V]
    logits of more than CHUNK rows.

    Args:
        hidden: [N, H], the states that predict the ids.
        ids: [N] int64.
        head: [n, H] to [n, V] logits.
        temperature: divides the logits, as in sampling.
        is_frozen: the head's weights have no gradient.

    Returns:
        [N] float32 each; entropies and variances carry no gradient.
    """

    def compute(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        logps = F.log_softmax(logits.float() / temperature, dim=-1)
        fixed = logps.detach()
        probabilities = fixed.exp()
        with torch.autocast(fixed.device.type, enabled=False):  # under which einsum rounds to bfloat16
            entropies = -torch.einsum("nv,nv->n", probabilities, fixed)
            variances = torch.einsum("nv,nv,nv->n", probabilities, fixed, fixed) - entropies**2
        return torch.stack([logps.gather(1, ids[:, None]).squeeze(1), entropies, variances.clamp(min=0)])

    return tuple(in_chunks(head, hidden, ids, compute, CHUNK, is_frozen))


# ---------------------------------------------------------------- rewards and advantages


def k3(policy_logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """[B, T] estimates of KL(policy || reference), never negative: r - 1 - log r with r = ref / policy.

    Schulman 2020, http://joschu.net/blog/kl-approx.html.
    """
    log_ratio = ref_logps - policy_logps
    return log_ratio.exp() - 1 - log_ratio


def token_rewards(scores: torch.Tensor, kl: torch.Tensor, mask: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """[B, T] rewards: -kl_coef x KL at each token of the reply, and the score once, at its last one.

    A row sums to score - kl_coef x sum(KL) (Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, equation 2).

    Args:
        scores: [B].
        kl: [B, T], k1 estimates: policy_logps - ref_logps.
    """
    rewards = -kl_coef * kl * mask
    last = mask.sum(dim=1) - 1
    rewards[torch.arange(len(scores), device=scores.device), last] += scores
    return rewards


def advantages_and_returns(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalized advantage estimation (Schulman et al. 2016, https://arxiv.org/abs/1506.02438, equation 16).

    A_t = sum over l of (gamma lam)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l}); V is 0 behind the last token.

    Args:
        rewards, values: [B, T]; what stands outside the mask is ignored.

    Returns:
        [B, T] advantages, not whitened, and returns = advantages + values; 0 outside the mask.
    """
    rewards, values = rewards * mask, values * mask
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(values[:, 0])  # the advantage of the next token
    next_value = torch.zeros_like(following)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * lam * following) * mask[:, t]
        advantages[:, t] = following
        next_value = values[:, t]
    return advantages, (advantages + values) * mask


# ---------------------------------------------------------------- losses


def policy_losses(
    logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor, cliprange: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T] clipped surrogate losses and where the clip holds them (Schulman et al. 2017,
    https://arxiv.org/abs/1707.06347, equation 7)."""
    ratio = (logps - old_logps).exp()
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(free, clipped), clipped > free


def truncated_ratios(policy_logps: torch.Tensor, sampler_logps: torch.Tensor, cap: float) -> torch.Tensor:
    """[B, T] importance ratios min(policy / sampler, cap) of tokens that another engine drew, by which the policy's
    losses are weighted (Yao et al. 2025, https://fengyao.notion.site/off-policy-rl; truncation of Ionides 2008)."""
    return (policy_logps - sampler_logps).exp().clamp(max=cap)


def value_losses(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, cliprange_value: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T] halved squared errors, of the value or of the value near the old one, whichever is larger; and where
    the clip holds them."""
    near = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    free, clipped = (values - returns) ** 2, (near - returns) ** 2
    return 0.5 * torch.maximum(free, clipped), clipped > free


def adapted_kl_coef(kl_coef: float, kl: float, target: float, n_episodes: int, horizon: int) -> float:
    """The KL coefficient after a batch whose mean KL a reply was `kl` (Ziegler et al. 2019, section 2.2)."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * n_episodes / horizon)
