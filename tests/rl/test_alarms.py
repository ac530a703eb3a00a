"""Measures of replies and updates by hand, and when they are alarms."""

import pytest
import torch

from medtune.rl.alarms import find_alarm
from medtune.rl.measures import EpisodeMeasures, TokenMeans, summarize
from medtune.rl.rollout import Rollout


def measures_of(kl: list[float], **changes: list[float]) -> EpisodeMeasures:
    """Replies of 10 tokens and more with these KLs."""
    n = len(kl)
    values = {
        "scores": list(range(n)),
        "ended": [1] * n,
        "n_tokens": [10 + row for row in range(n)],
        "kl": kl,
        "kl_k3": [0.1] * n,
        "entropy": [20.0] * n,
        "surprise": [0.0] * n,
        "variance": [30.0] * n,
    } | changes
    return EpisodeMeasures(**{name: torch.tensor(column, dtype=torch.float64) for name, column in values.items()})


def test_surprisal_is_an_alarm_only_beyond_the_spread_that_the_policy_gives_it():
    one_token = {"n_tokens": [1] * 32, "surprise": [-1.2] * 32, "variance": [6.0] * 32}
    assert find_alarm(measures_of([0.0] * 32, **one_token), 50.0, 0) is None, "the likeliest by chance"
    far = measures_of([0.0] * 8, surprise=[40.5] * 8)
    assert "differs from its entropy by 3.00 nats a token" in find_alarm(far, 50.0, 0)


def test_negative_kl_is_an_alarm_only_where_it_is_no_chance():
    assert find_alarm(measures_of([-0.5, 0.6, -0.4, 0.2]), 50.0, 0) is None
    assert find_alarm(measures_of([-9.0, 12.0, -15.0, 4.0]), 50.0, 0) is None  # -2 on average, with a wide spread
    assert "-3.0 nats a reply, clearly below 0" in find_alarm(measures_of([-3.1, -2.9, -3.0, -3.0]), 50.0, 0)
    assert "60.0 nats a reply, over --stop_at_kl 50" in find_alarm(measures_of([60.0, 60.0]), 50.0, 0)


def test_measures_by_hand():
    counts = {"scores": [2.0, 4.0], "ended": [1, 0], "n_tokens": [4, 8]}
    measures = measures_of([1.0, 3.0], kl_k3=[0.5, 1.5], entropy=[8.0, 4.0], **counts)
    found = summarize(measures, kl_coef=0.1, missing_eos_penalty=1.0)
    assert found == pytest.approx(
        {
            "objective/score": 3.0,
            "objective/score_std": 1.0,
            "objective/kl": 2.0,
            "objective/kl_k3": 1.0,
            "objective/entropy": 1.0,  # 12 nats over 12 tokens
            "objective/rlhf_reward": 2.3,  # (2 - 0.1 + 4 - 1 - 0.3) / 2
            "reply/mean_len": 6.0,
            "reply/eos_frac": 0.5,
        }
    )


def test_measures_of_a_rollout_by_hand():
    """Two replies, of two tokens and of one; what stands outside the mask counts nowhere."""
    mask = torch.tensor([[True, True], [True, False]])
    rollout = Rollout(
        ids=torch.ones(2, 3, dtype=torch.long),
        attention_mask=torch.cat([mask[:, :1], mask], dim=1),
        mask=mask,
        ended=torch.tensor([True, False]),
        policy_logps=torch.tensor([[-1.0, -2.0], [-3.0, 9.0]]),
        ref_logps=torch.tensor([[-1.0, -3.0], [-2.0, 0.0]]),
        values=torch.zeros(2, 2),
        entropies=torch.tensor([[0.5, 0.5], [1.0, 9.0]]),
        variances=torch.tensor([[2.0, 1.0], [4.0, 9.0]]),
        scores=torch.tensor([5.0, 7.0]),
    )
    measures = EpisodeMeasures.of(rollout)
    assert measures.n_tokens.tolist() == [2, 1]
    assert measures.ended.tolist() == [1, 0]
    assert measures.kl.tolist() == [1, -1]
    assert measures.entropy.tolist() == [1, 1]
    assert measures.surprise.tolist() == [2, 2]
    assert measures.variance.tolist() == [3, 4]
    joined = EpisodeMeasures.join([measures, measures.first(1)])
    assert joined.scores.tolist() == [5, 7, 5]


def test_token_means_count_every_token_of_all_processes_once():
    means = TokenMeans(sum_over_processes=lambda sums: 2 * sums)  # as if another process had the same
    means.add(torch.tensor([[True, True, False]]), {"loss": torch.tensor([[1.0, 3.0, 99.0]])})
    means.add(torch.tensor([[True]]), {"loss": torch.tensor([[8.0]])})
    assert means.means() == {"loss": 4.0}
