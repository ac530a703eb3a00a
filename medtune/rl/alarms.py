"""What rollouts and updates show to be wrong with a run."""

import math

import torch

from medtune.rl.measures import EpisodeMeasures

# Alarms: so many updates in a row without a reply that ends; so many standard errors from what should be; KL in nats
# a token between the policy before an update and in it, which in sound updates stays below 0.1.
UPDATES_WITHOUT_END = 5
STANDARD_ERRORS = 5.0
TOO_LARGE_A_STEP = 1.0


def find_alarm(measures: EpisodeMeasures, stop_at_kl: float, updates_without_end: int) -> str | None:
    """Check the sampled replies before an update learns from them: what is wrong with the run, or None.

    Args:
        measures: of replies sampled from the policy.
        updates_without_end: how many updates in a row, this one included, had no reply with an end token.
    """
    scores, kl, n_replies = measures.scores, measures.kl, len(measures.scores)
    if not torch.isfinite(scores).all():
        return "the reward model gives scores that are not finite: its weights are broken; train it anew"
    if n_replies > 1 and measures.n_tokens.std() > 0 and scores.std() < 1e-6:
        return (
            f"the reward model gives {n_replies} different replies the same score, {scores[0].item():g}: there is "
            "nothing to learn from; look at it with reward_modeling.py --do_eval"
        )
    if not torch.isfinite(kl).all():
        return "the KL from the reference is not finite: the policy is broken; lower --learning_rate"
    mean_kl = kl.mean().item()
    if mean_kl > stop_at_kl:
        return (
            f"the KL from the reference is {mean_kl:.1f} nats a reply, over --stop_at_kl {stop_at_kl:g}: the policy "
            "has left what the reward model can judge; lower --learning_rate, or raise --kl_coef"
        )
    # For tokens drawn from the policy, surprisal less entropy has mean 0, and the variance that the policy gives it.
    gap, error = measures.surprise.sum().item(), math.sqrt(measures.variance.sum().item())
    n_tokens = measures.n_tokens.sum().item()
    if abs(gap) > max(STANDARD_ERRORS * error, 0.1 * n_tokens):
        return (
            f"replies are not drawn from the policy: their tokens' surprisal differs from its entropy by "
            f"{gap / n_tokens:.2f} nats a token on average; the log-probs are the model's own, so generation, which "
            "pads and keeps a cache, computes something else: try --flash_attn False, or --torch_dtype float32"
        )
    if n_replies > 1 and mean_kl < -1 and mean_kl < -STANDARD_ERRORS * kl.std().item() / math.sqrt(n_replies):
        return (
            f"the KL from the reference is {mean_kl:.1f} nats a reply, clearly below 0, which no policy's own replies "
            "have: they are less likely under the policy than under the reference; lower --learning_rate"
        )
    if updates_without_end >= UPDATES_WITHOUT_END:
        return (
            f"no reply of {updates_without_end} updates in a row has an end token: raise --response_length, or train "
            "SFT longer so that its replies end; --stop_token must be the token that ends them"
        )
    return None


def find_update_alarm(metrics: dict[str, float]) -> str | None:
    """Check the measures of an update: what is wrong with the run, or None."""
    if metrics["policy/approx_kl"] <= TOO_LARGE_A_STEP:
        return None
    return (
        f"it moved the policy by {metrics['policy/approx_kl']:.1f} nats a token from the one that wrote the replies, "
        "which breaks it; lower --learning_rate"
    )
