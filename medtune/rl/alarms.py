"""What rollouts and updates show to be wrong with a run."""

import math

import torch

from medtune.rl.measures import EpisodeMeasures, GroupMeasures, ReplyMeasures
from medtune.rl.rewards import REWARD_MODEL, Rewards

# Alarms: so many updates in a row without a reply that ends; so many standard errors from what should be; KL in nats
# a token between the policy before an update and in it, which in sound updates stays below 0.1.
UPDATES_WITHOUT_END = 5
STANDARD_ERRORS = 5.0
TOO_LARGE_A_STEP = 1.0
# So many updates in a row whose rewards are all equal; of GRPO, so many groups in them too, and shares of what entropy
# and the share of ended replies were in the first update.
UPDATES_IN_A_ROW = 5
GROUPS_WITHOUT_SIGNAL = 100
COLLAPSED = 0.02
RUN_AWAY = 0.5


def find_alarm(
    measures: EpisodeMeasures,
    rewards: Rewards,
    stop_at_kl: float,
    updates_without_end: int,
    updates_without_signal: int,
) -> str | None:
    """Check the sampled replies before an update learns from them: what is wrong with the run, or None.

    Args:
        measures: of replies sampled from the policy.
        rewards: what they were scored by.
        updates_without_end: how many updates in a row, this one included, had no reply with an end token.
        updates_without_signal: how many there were, all of whose replies had the same score; 0 once they differed.
    """
    scores, kl, n_replies = measures.scores, measures.kl, len(measures.scores)
    if not torch.isfinite(scores).all():
        return "the reward model gives scores that are not finite: its weights are broken; train it anew"
    is_by_model = rewards.names == (REWARD_MODEL,)
    if is_by_model and n_replies > 1 and measures.n_tokens.std() > 0 and scores.std() < 1e-6:
        return (
            f"the reward model gives {n_replies} different replies the same score, {scores[0].item():g}: there is "
            "nothing to learn from; look at it with reward_modeling.py --do_eval"
        )
    if not is_by_model and n_replies > 1 and updates_without_signal >= UPDATES_IN_A_ROW:
        return (
            f"all replies of the first {updates_without_signal} updates have the same score, {scores[0].item():g}: "
            "there is nothing to learn; where all are wrong take easier prompts, more SFT or a reward for the form "
            "(format), where all are right harder prompts"
        )
    if not torch.isfinite(kl).all():
        return "the KL from the reference is not finite: the policy is broken; lower --learning_rate"
    mean_kl = kl.mean().item()
    if mean_kl > stop_at_kl:
        return (
            f"the KL from the reference is {mean_kl:.1f} nats a reply, over --stop_at_kl {stop_at_kl:g}: the policy "
            "has left what the reward model can judge; lower --learning_rate, or raise --kl_coef"
        )
    if alarm := _find_sampler_alarm(measures):
        return alarm
    if n_replies > 1 and mean_kl < -1 and mean_kl < -STANDARD_ERRORS * kl.std().item() / math.sqrt(n_replies):
        return (
            f"the KL from the reference is {mean_kl:.1f} nats a reply, clearly below 0, which no policy's own replies "
            "have: they are less likely under the policy than under the reference; lower --learning_rate"
        )
    return _find_ending_alarm(updates_without_end)


def _find_sampler_alarm(measures: ReplyMeasures) -> str | None:
    # For tokens drawn from the policy, surprisal less entropy has mean 0, and the variance that the policy gives it.
    gap, error = measures.surprise.sum().item(), math.sqrt(measures.variance.sum().item())
    n_tokens = measures.n_tokens.sum().item()
    if abs(gap) <= max(STANDARD_ERRORS * error, 0.1 * n_tokens):
        return None
    return (
        f"replies are not drawn from the policy: their tokens' surprisal differs from its entropy by "
        f"{gap / n_tokens:.2f} nats a token on average; the log-probs are the model's own, so generation, which "
        "pads and keeps a cache, computes something else: try --flash_attn False, or --torch_dtype float32"
    )


def _find_ending_alarm(updates_without_end: int) -> str | None:
    if updates_without_end < UPDATES_WITHOUT_END:
        return None
    return (
        f"no reply of {updates_without_end} updates in a row has an end token: raise --response_length, or train "
        "SFT longer so that its replies end; --stop_token must be the token that ends them"
    )


def find_update_alarm(metrics: dict[str, float], stop_at_kl: float | None = None) -> str | None:
    """Check the measures of an update: what is wrong with the run, or None.

    stop_at_kl: GRPO's flag, the most that an update may move the policy by, in nats a token.
    """
    kl, limit = metrics["policy/approx_kl"], TOO_LARGE_A_STEP if stop_at_kl is None else stop_at_kl
    if kl <= limit:
        return None
    over = "which breaks it" if stop_at_kl is None else f"over --stop_at_kl {stop_at_kl:g}"
    moved = f"it moved the policy by {kl:.2g} nats a token from the one that wrote the replies"
    return f"{moved}, {over}; lower --learning_rate"


# ---------------------------------------------------------------- groups


def count_in_a_row(streaks: dict[str, int], start: dict[str, float], metrics: dict[str, float]) -> None:
    """Count for how many updates in a row something has been so; `start` keeps figures of the first update."""
    for name in ("objective/entropy", "reply/eos_frac"):
        start.setdefault(name, metrics[name])
    holds = {
        "no end": metrics["reply/eos_frac"] == 0,
        "no signal": metrics.get("groups/no_signal_frac") == 1,
        "collapsed": metrics["objective/entropy"] < COLLAPSED * start["objective/entropy"],
        "run away": metrics["reply/eos_frac"] < RUN_AWAY * start["reply/eos_frac"],
    }
    streaks |= {name: streaks.get(name, 0) + 1 if is_so else 0 for name, is_so in holds.items()}


def find_group_alarm(
    measures: GroupMeasures, metrics: dict[str, float], stop_at_kl: float, streaks: dict[str, int], n_groups: int
) -> str | None:
    """Check GRPO's sampled replies before an update learns from them: what is wrong with the run, or None.

    n_groups: of an update.
    """
    if not torch.isfinite(measures.rewards).all():
        return "the reward model gives scores that are not finite: its weights are broken; train it anew"
    if (kl := metrics.get("objective/token_kl", 0.0)) > stop_at_kl:
        return (
            f"the KL from the reference is {kl:.2g} nats a token, over --stop_at_kl {stop_at_kl:g}: the policy is far "
            "from its start; lower --learning_rate, or raise --beta"
        )
    if alarm := _find_sampler_alarm(measures):
        return alarm
    without = streaks["no signal"]
    if without >= UPDATES_IN_A_ROW and without * n_groups >= GROUPS_WITHOUT_SIGNAL:
        return (
            f"no group of {without} updates in a row has replies of different rewards ({metrics['objective/reward']:g} "
            "on average), so there is nothing to learn: where all are wrong take easier prompts, more SFT or a reward "
            "for the form (format), where all are right harder prompts; a higher --temperature or --num_generations "
            "makes them differ"
        )
    return _find_ending_alarm(streaks["no end"])


def find_teacher_alarm(measures: ReplyMeasures, streaks: dict[str, int]) -> str | None:
    """Check the replies that distillation has sampled before an update learns from them: what is wrong, or None.

    measures: with the KL from the teacher, where it has given its log-probs yet.
    """
    if not torch.isfinite(measures.kl_k3).all():
        return "the teacher gives log-probs that are not finite: its weights are broken; take another teacher"
    return _find_sampler_alarm(measures) or _find_ending_alarm(streaks["no end"])


def find_warnings(metrics: dict[str, float], streaks: dict[str, int], start: dict[str, float]) -> list[str]:
    """What a run should be looked at for, once each time it has been so for some updates in a row."""
    warnings = []
    if streaks["collapsed"] == UPDATES_IN_A_ROW:
        warnings.append(
            f"the entropy has collapsed, from {start['objective/entropy']:.3f} to {metrics['objective/entropy']:.4f} "
            "nats a token: the replies to a prompt are nearly the same, and little more is learned. If the reward is "
            "not where it should be: --epsilon_high 0.28, a higher --temperature or a lower --learning_rate"
        )
    if streaks["run away"] == UPDATES_IN_A_ROW:
        warnings.append(
            f"the replies run away: {metrics['reply/eos_frac']:.0%} end within --response_length, at the start "
            f"{start['reply/eos_frac']:.0%}: add the reward length, raise --response_length, or lower --learning_rate"
        )
    return warnings
