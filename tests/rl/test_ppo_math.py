"""The arithmetic of PPO against numbers worked by hand and brute force."""

import math

import pytest
import torch

from medtune.rl import ppo_math
from medtune.rl.ppo_math import (
    adapted_kl_coef,
    advantages_and_returns,
    k3,
    masked_whiten,
    policy_losses,
    position_ids,
    reply_mask,
    token_logps,
    token_rewards,
    value_losses,
)


def close(found: torch.Tensor, expected, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), atol=tolerance, rtol=0)


# ---------------------------------------------------------------- three sequences by hand

END, PAD = 7, 0
# The prompts hold end tokens, as ChatML's do: nothing of them counts. The first row is padded on the left.
PROMPTS = torch.tensor([[PAD, PAD, 3, END], [3, END, 4, END], [5, 3, END, 4]])
# One ends at its second token, with padding behind; one at its last; one is cut.
REPLIES = torch.tensor([[5, END, PAD], [6, 5, END], [6, 6, 6]])
MASK = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1]], dtype=torch.bool)
KL = torch.tensor([[0.5, -0.1, 9.0], [0.0, 0.2, 0.4], [0.1, 0.1, 0.1]])


def test_reply_ends_at_its_own_end_token_alone():
    mask, ended = reply_mask(REPLIES, [END])
    assert mask.tolist() == MASK.tolist()
    assert ended.tolist() == [True, True, False]
    mask, ended = reply_mask(REPLIES, [5, END])  # several stop tokens: the first that comes
    assert mask.sum(dim=1).tolist() == [1, 2, 3]
    # An end token used as padding behind the first one is no part of the reply.
    mask, _ = reply_mask(torch.tensor([[END, END, END]]), [END])
    assert mask.tolist() == [[True, False, False]]


def test_positions_start_at_the_first_real_token():
    mask = torch.cat([torch.tensor([[0, 0, 1, 1], [1] * 4, [1] * 4]), MASK.long()], dim=1)
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2, 3, 3], list(range(7)), list(range(7))]


def test_score_stands_once_at_the_last_token_and_kl_at_each():
    # Scores after the penalty of 1 for the reply that did not end: 2 - 1 = 1.
    _, ended = reply_mask(REPLIES, [END])
    scores = torch.tensor([3.0, -1.0, 2.0]) - 1.0 * ~ended
    assert scores.tolist() == [3.0, -1.0, 1.0]
    rewards = token_rewards(scores, KL, MASK, kl_coef=0.1)
    close(rewards, [[-0.05, 3.01, 0.0], [0.0, -0.02, -1.04], [-0.01, -0.01, 0.99]])
    close(rewards.sum(dim=1), [2.96, -1.06, 0.97])  # score - 0.1 x sum(KL): 3 - 0.04, -1 - 0.06, 1 - 0.03


def test_advantages_of_three_sequences_by_hand():
    rewards = torch.tensor([[0.0, 3.0, 50.0], [0.0, 0.0, -1.0], [0.0, 0.0, 1.0]])
    values = torch.tensor([[1.0, 2.0, 70.0], [0.5, 0.5, 0.5], [0.0, 1.0, 2.0]])
    advantages, returns = advantages_and_returns(rewards, values, MASK, gamma=1.0, lam=0.5)
    # Row 1: delta = (0 + 2 - 1, 3 + 0 - 2) = (1, 1), so A = (1 + 0.5 x 1, 1). Behind the end nothing.
    # Row 2: delta = (0, 0, -1.5), A = (-0.375, -0.75, -1.5). Row 3: delta = (1, 1, -1), A = (1.25, 0.5, -1).
    close(advantages, [[1.5, 1.0, 0.0], [-0.375, -0.75, -1.5], [1.25, 0.5, -1.0]])
    close(returns, [[2.5, 3.0, 0.0], [0.125, -0.25, -1.0], [1.25, 1.5, 1.0]])


# ---------------------------------------------------------------- brute force and limits


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 0.0), (1.0, 1.0)])
def test_advantages_equal_the_sum_that_defines_them(gamma, lam):
    torch.manual_seed(0)
    lengths = [1, 4, 9, 6]
    rewards, values = torch.randn(2, 4, 9, dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    advantages, returns = advantages_and_returns(rewards, values, mask, gamma, lam)
    for row, length in enumerate(lengths):
        r, v = rewards[row].tolist(), [*values[row, :length].tolist(), 0.0]
        for t in range(length):
            expected = sum((gamma * lam) ** (s - t) * (r[s] + gamma * v[s + 1] - v[s]) for s in range(t, length))
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[row, t].item() == pytest.approx(expected + v[t], abs=1e-12)
            if lam == 1.0 and gamma == 1.0:
                assert returns[row, t].item() == pytest.approx(sum(r[t:length]), abs=1e-12)
        assert not advantages[row, length:].any()
        assert not returns[row, length:].any()


def test_whitening_sees_the_mask_alone():
    values = torch.tensor([[1.0, 3.0, 100.0], [5.0, 7.0, -100.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]], dtype=torch.bool)
    # 1, 3, 5, 7: mean 4, variance 5.
    step = 1 / math.sqrt(5)
    close(masked_whiten(values, mask), [[-3 * step, -step, 0.0], [step, 3 * step, 0.0]])
    close(masked_whiten(values, mask, shift_mean=False), [[4 - 3 * step, 4 - step, 0.0], [4 + step, 4 + 3 * step, 0.0]])


def test_whitening_over_two_processes_is_that_of_all_values():
    torch.manual_seed(0)
    values, mask = torch.randn(4, 5), torch.rand(4, 5) > 0.3
    whole = masked_whiten(values, mask)

    def moments(rows: slice) -> list[torch.Tensor]:
        """What one process adds up, in the order of the calls."""
        kept = []
        masked_whiten(values[rows], mask[rows], sum_over_processes=lambda tensor: kept.append(tensor) or tensor)
        return kept

    count, total = moments(slice(0, 2))[0] + moments(slice(2, 4))[0]
    variance = ((values.double() - total / count) ** 2 * mask).sum()
    answers = iter([torch.stack([count, total]), variance])
    half = masked_whiten(values[:2], mask[:2], sum_over_processes=lambda tensor: next(answers))
    torch.testing.assert_close(half, whole[:2])


# ---------------------------------------------------------------- log-probs


def test_token_logps_in_chunks(monkeypatch):
    monkeypatch.setattr(ppo_math, "CHUNK", 3)
    torch.manual_seed(0)
    hidden, weights, ids = torch.randn(7, 4, requires_grad=True), torch.randn(4, 11), torch.arange(7)
    logps, entropies, variances = token_logps(hidden, ids, lambda states: states @ weights, temperature=0.7)
    whole = ((hidden @ weights) / 0.7).log_softmax(dim=-1)
    torch.testing.assert_close(logps, whole[torch.arange(7), ids])
    torch.testing.assert_close(entropies, torch.distributions.Categorical(logits=whole).entropy())
    of_surprisal = (whole.exp() * (-whole - entropies[:, None]) ** 2).sum(dim=-1)
    torch.testing.assert_close(variances, of_surprisal.detach())
    (gradient,) = torch.autograd.grad(logps.sum(), hidden)
    (expected,) = torch.autograd.grad(whole[torch.arange(7), ids].sum(), hidden)
    torch.testing.assert_close(gradient, expected)


def test_token_logps_are_float32_under_autocast():
    states, head, ids = torch.randn(5, 8), torch.nn.Linear(8, 50), torch.arange(5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = head(states)
        found = token_logps(states, ids, head, temperature=1.0)
    assert logits.dtype == torch.bfloat16
    assert {values.dtype for values in found} == {torch.float32}
    entropies = torch.distributions.Categorical(logits=logits.float()).entropy()
    torch.testing.assert_close(found[1], entropies, atol=1e-5, rtol=1e-5)


def test_kl_estimates():
    same = torch.tensor([[-1.0, -2.0]])
    assert not k3(same, same).any()
    # r = ref / policy = 2: 2 - 1 - ln 2.
    close(k3(torch.tensor([[-1.0]]), torch.tensor([[-1.0 + math.log(2)]])), [[1 - math.log(2)]])
    # Its mean under the policy is the KL divergence: 0.75 ln 1.5 + 0.25 ln 0.5 for (3/4, 1/4) against (1/2, 1/2).
    policy, reference = torch.tensor([0.75, 0.25]).log(), torch.tensor([0.5, 0.5]).log()
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert (policy.exp() * k3(policy, reference)).sum().item() == pytest.approx(kl, abs=1e-6)


# ---------------------------------------------------------------- losses


def test_policy_loss_by_hand():
    # Ratios 1, 1.5, 0.5, 1.5, 0.5 with a clip of 0.2 and advantages of both signs.
    ratios = torch.tensor([[1.0, 1.5, 0.5, 1.5, 0.5]])
    advantages = torch.tensor([[2.0, 1.0, 1.0, -1.0, -1.0]])
    losses, clipped = policy_losses(ratios.log(), torch.zeros(1, 5), advantages, 0.2)
    close(losses, [[-2.0, -1.2, -0.5, 1.5, 0.8]])
    assert clipped.tolist() == [[False, True, False, False, True]]


def test_first_step_has_ratio_one_and_the_plain_policy_gradient():
    logps = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    advantages = torch.tensor([[3.0, -4.0]])
    losses, clipped = policy_losses(logps, logps.detach(), advantages, 0.2)
    close(losses, [[-3.0, 4.0]])
    assert not clipped.any()
    (gradient,) = torch.autograd.grad(losses.sum(), logps)
    close(gradient, [[-3.0, 4.0]])


def test_value_loss_by_hand():
    values, old = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[1.0, 1.0, 1.0]])
    returns = torch.tensor([[3.0, 3.0, 0.0]])
    losses, clipped = value_losses(values, old, returns, 0.2)
    # 4 / 2; max(1, (1.2 - 3)^2 = 3.24) / 2; max(0, 0.8^2) / 2
    close(losses, [[2.0, 1.62, 0.32]])
    assert clipped.tolist() == [[False, True, True]]


def test_adapted_kl_coefficient():
    assert adapted_kl_coef(0.1, kl=6.0, target=6.0, n_episodes=64, horizon=10000) == 0.1
    assert adapted_kl_coef(0.1, 6.6, 6.0, 1000, 10000) == pytest.approx(0.1 * 1.01)  # 10 % over
    assert adapted_kl_coef(0.1, 60.0, 6.0, 1000, 10000) == pytest.approx(0.1 * 1.02)  # at most 20 %
    assert adapted_kl_coef(0.1, -3.0, 6.0, 1000, 10000) == pytest.approx(0.1 * 0.98)
