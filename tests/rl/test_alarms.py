"""Measures of replies and updates by hand, and when they are alarms."""

import pytest
import torch

from medtune.rl.alarms import count_in_a_row, find_alarm, find_group_alarm, find_warnings
from medtune.rl.arguments import RewardArguments
from medtune.rl.measures import EpisodeMeasures, GroupMeasures, TokenMeans, summarize, summarize_groups
from medtune.rl.rewards import Rewards, load_rewards
from medtune.rl.rollout import Rollout

BY_MODEL = load_rewards(RewardArguments(reward_model_path="rm"), response_length=40)
BY_RULES = load_rewards(RewardArguments(rewards=["exam", "format:0.5"]), response_length=40)


def measures_of(kl: list[float], **changes: list[float]) -> EpisodeMeasures:
    """Replies of 10 tokens and more with these KLs."""
    n = len(kl)
    values = {
        "scores": list(range(n)),
        "rewards": [[score] for score in range(n)],
        "ended": [1] * n,
        "n_tokens": [10 + row for row in range(n)],
        "kl": kl,
        "kl_k3": [0.1] * n,
        "entropy": [20.0] * n,
        "surprise": [0.0] * n,
        "variance": [30.0] * n,
    } | changes
    return EpisodeMeasures(**{name: torch.tensor(column, dtype=torch.float64) for name, column in values.items()})


def alarm_of(measures: EpisodeMeasures, rewards: Rewards = BY_MODEL, updates_without_signal: int = 0) -> str | None:
    return find_alarm(measures, rewards, 50.0, 0, updates_without_signal)


def test_equal_scores_are_an_alarm_at_once_of_a_model_and_after_some_updates_of_rules():
    same = measures_of([0.0] * 4, scores=[0.0] * 4)
    assert "gives 4 different replies the same score, 0" in alarm_of(same)
    assert alarm_of(same, BY_RULES, 4) is None, "all wrong by chance"
    assert "all replies of the first 5 updates have the same score, 0" in alarm_of(same, BY_RULES, 5)


def test_surprisal_is_an_alarm_only_beyond_the_spread_that_the_policy_gives_it():
    one_token = {"n_tokens": [1] * 32, "surprise": [-1.2] * 32, "variance": [6.0] * 32}
    assert alarm_of(measures_of([0.0] * 32, **one_token)) is None, "the likeliest by chance"
    far = measures_of([0.0] * 8, surprise=[40.5] * 8)
    assert "differs from its entropy by 3.00 nats a token" in alarm_of(far)


def test_negative_kl_is_an_alarm_only_where_it_is_no_chance():
    assert alarm_of(measures_of([-0.5, 0.6, -0.4, 0.2])) is None
    assert alarm_of(measures_of([-9.0, 12.0, -15.0, 4.0])) is None  # -2 on average, with a wide spread
    assert "-3.0 nats a reply, clearly below 0" in alarm_of(measures_of([-3.1, -2.9, -3.0, -3.0]))
    assert "60.0 nats a reply, over --stop_at_kl 50" in alarm_of(measures_of([60.0, 60.0]))


def test_measures_by_hand():
    counts = {"scores": [2.0, 4.0], "ended": [1, 0], "n_tokens": [4, 8]}
    measures = measures_of([1.0, 3.0], kl_k3=[0.5, 1.5], entropy=[8.0, 4.0], **counts)
    found = summarize(measures, BY_MODEL, kl_coef=0.1, missing_eos_penalty=1.0)
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


def test_each_rewards_mean_and_deviation():
    measures = measures_of([0.0] * 2, rewards=[[1, 0], [0, 0]])
    found = summarize(measures, BY_RULES, kl_coef=0.1, missing_eos_penalty=0.0)
    rewards = {name: figure for name, figure in found.items() if name.startswith("reward/")}
    assert rewards == {"reward/exam": 0.5, "reward/exam_std": 0.5, "reward/format": 0, "reward/format_std": 0}


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
        rewards=torch.tensor([[5.0], [7.0]]),
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


# ---------------------------------------------------------------- groups


def groups_of(rewards: list[list[float]], **changes: list[float]) -> GroupMeasures:
    """Replies of 10 tokens with these rewards."""
    n = len(rewards)
    values = {"rewards": rewards, "ended": [1] * n, "n_tokens": [10] * n, "kl_k3": [0.5] * n, "entropy": [20.0] * n}
    values |= {"surprise": [0.0] * n, "variance": [30.0] * n} | changes
    return GroupMeasures(**{name: torch.tensor(column, dtype=torch.float64) for name, column in values.items()})


def test_measures_of_groups_by_hand():
    """Two groups of two replies and two rewards; the second group has no signal."""
    measures = groups_of([[1, 0], [0, 0.5], [1, 0], [1, 0]], ended=[1, 0, 1, 1], n_tokens=[10, 30, 20, 20])
    learns = torch.tensor([True, True, False, False])
    totals = measures.rewards @ torch.tensor([1.0, 2.0], dtype=torch.float64)
    found = summarize_groups(measures, totals, learns, ["exam", "format"], has_reference=True)
    assert found == pytest.approx(
        {
            "objective/reward": 1.0,
            "objective/reward_std": 0.0,
            "reward/exam": 0.75,
            "reward/exam_std": 0.1875**0.5,
            "reward/format": 0.125,
            "reward/format_std": 0.046875**0.5,
            "objective/token_kl": 2 / 80,
            "objective/entropy": 1.0,
            "groups/no_signal_frac": 0.5,
            "reply/mean_len": 20.0,
            "reply/eos_frac": 0.75,
        }
    )
    assert "objective/token_kl" not in summarize_groups(measures, totals, learns, ["exam", "format"], False)


def test_parts_of_processes_come_in_the_order_of_the_episodes():
    parts = [groups_of([[0.0], [2.0]]), groups_of([[1.0], [3.0]])]  # of two processes, every second episode each
    assert GroupMeasures.interleave(parts).rewards.tolist() == [[0.0], [1.0], [2.0], [3.0]]
    assert GroupMeasures.interleave(parts).ended.tolist() == [1, 1, 1, 1]


SOUND = {"objective/entropy": 1.0, "reply/eos_frac": 0.9, "groups/no_signal_frac": 0.3, "objective/reward": 0.5}


def after(n_updates: int, **changes: float) -> tuple[dict, dict, dict]:
    """Metrics, streaks and start of a run whose figures have been these for so many updates behind a sound one."""
    streaks, start, metrics = {}, {}, SOUND | {name.replace("__", "/"): value for name, value in changes.items()}
    count_in_a_row(streaks, start, SOUND)
    for _ in range(n_updates):
        count_in_a_row(streaks, start, metrics)
    return metrics, streaks, start


@pytest.mark.parametrize(
    ("changes", "n_groups", "n_sound", "message"),
    [
        ({"groups__no_signal_frac": 1.0}, 16, 6, "no group of 7 updates in a row has replies of different rewards"),
        ({"groups__no_signal_frac": 1.0}, 64, 4, "no group of 5 updates in a row"),
        ({"reply__eos_frac": 0.0}, 16, 4, "no reply of 5 updates in a row has an end token"),
        ({"objective__token_kl": 1.5}, 16, 0, "the KL from the reference is 1.5 nats a token, over --stop_at_kl 1:"),
    ],
)
def test_what_stops_a_run(changes, n_groups, n_sound, message):
    measures = groups_of([[0.0], [1.0]])

    def alarm(n_updates: int) -> str | None:
        metrics, streaks, _ = after(n_updates, **changes)
        return find_group_alarm(measures, metrics, 1.0, streaks, n_groups)

    if n_sound:
        assert alarm(n_sound) is None
    assert message in alarm(n_sound + 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective__entropy": 0.01}, "the entropy has collapsed, from 1.000 to 0.0100 nats a token"),
        ({"reply__eos_frac": 0.4}, "the replies run away: 40% end within --response_length, at the start 90%"),
    ],
)
def test_what_a_run_is_warned_of_once(changes, message):
    metrics, streaks, start = after(5, **changes)
    (warning,) = find_warnings(metrics, streaks, start)
    assert message in warning
    assert not find_warnings(*after(4, **changes))
    assert not find_warnings(*after(6, **changes))
