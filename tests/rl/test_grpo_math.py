"""The arithmetic of GRPO by hand, and its losses and gradients against TRL's."""

from collections import defaultdict
from types import MethodType, SimpleNamespace

import pytest
import torch
from trl import GRPOTrainer

from medtune.rl.grpo_math import (
    LOSS_TYPES,
    Whole,
    group_advantages,
    has_signal,
    mean_of_replies,
    mean_of_tokens,
    sequence_log_ratios,
    sum_over_constant,
    surrogate_losses,
)
from medtune.rl.ppo_math import k3

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)


def close(found: torch.Tensor, expected, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), atol=tolerance, rtol=0)


# ---------------------------------------------------------------- by hand


def test_advantages_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 2.0, 2.0, 6.0])
    close(group_advantages(rewards, 4, scale=False), [0.5, -0.5, -0.5, 0.5, -1.0, -1.0, -1.0, 3.0])
    # Deviations: sqrt(4 x 0.25 / 3) = 0.57735, sqrt((3 + 9) / 3) = 2.
    close(group_advantages(rewards, 4, scale=True)[:2], [0.5 / 0.57745, -0.5 / 0.57745], 1e-4)
    close(group_advantages(rewards, 4, scale=True)[4:], [-0.49998, -0.49998, -0.49998, 1.49993], 1e-4)


def test_a_group_of_equal_rewards_has_no_signal():
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.1 + 0.2, 0.3])
    assert has_signal(rewards, 2).tolist() == [False, False, True, True, False, False]


def test_the_clip_by_hand():
    # Ratios 0.5, 1.25, 1.5 with advantages of both signs; lower clip 0.8, upper 1.3.
    log_ratios = torch.tensor([[0.5, 1.25, 1.5]] * 2).log()
    losses, clipped = surrogate_losses(log_ratios, torch.tensor([2.0, -1.0]), 0.2, 0.3)
    close(losses, [[-1.0, -2.5, -2.6], [0.8, 1.25, 1.5]])
    assert clipped.tolist() == [[False, False, True], [True, False, False]]


def test_a_sequence_has_one_ratio():
    logps = torch.tensor([[-1.0, -2.0, 9.0]])
    mask = torch.tensor([[True, True, False]])
    close(sequence_log_ratios(logps, torch.tensor([[-1.5, -3.0, 0.0]]), mask), [[0.75] * 3])  # (0.5 + 1) / 2


def test_means_by_hand_and_from_parts():
    """Two replies, of three tokens and of one; in two parts they add up to the same."""
    losses = torch.tensor([[1.0, 2.0, 3.0, 50.0], [10.0, 50.0, 50.0, 50.0]])
    whole = Whole(n_replies=2, n_tokens=4, max_tokens=8)
    for average, expected in ((mean_of_tokens, 4.0), (mean_of_replies, 6.0), (sum_over_constant, 1.0)):
        assert average(losses, MASK[:2], whole).item() == expected
        assert average(losses[:1], MASK[:1], whole) + average(losses[1:], MASK[1:2], whole) == expected


# ---------------------------------------------------------------- against TRL


def trl_loss(loss_type: str, logps: torch.Tensor, inputs: dict, epsilons: tuple[float, float], beta: float):
    """What TRL's trainer makes of log-probs, in one step of one process."""
    trl_type, level = ("grpo", "sequence") if loss_type == "gspo" else (loss_type, "token")
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=1, gather=lambda t: t, reduce=lambda t, reduction: t),
        model=torch.nn.Linear(1, 1),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        loss_type=trl_type,
        importance_sampling_level=level,
        beta=beta,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        max_completion_length=8,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *args, **options: (logps, torch.zeros_like(logps), None),
    )
    trainer.epsilon_low, trainer.epsilon_high = epsilons
    return MethodType(GRPOTrainer._compute_loss, trainer)(trainer.model, inputs)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_losses_and_gradients_are_those_of_trl(loss_type, beta):
    torch.manual_seed(1)
    old_logps, moved, ref = -2 * torch.rand(4, 4), 1.5 * torch.randn(4, 4), 0.5 * torch.randn(4, 4)
    rewards, epsilons = torch.tensor([1.0, 0.0, 3.0, 0.5]), (0.2, 0.28)
    ours, theirs = ((old_logps + moved).requires_grad_() for _ in range(2))

    log_ratios_of, average = LOSS_TYPES[loss_type]
    advantages = group_advantages(rewards, 2, scale=True)
    losses, clipped = surrogate_losses(log_ratios_of(ours, old_logps, MASK), advantages, *epsilons)
    assert clipped[MASK].any()
    assert not clipped[MASK].all()
    losses = losses + beta * k3(ours, old_logps + ref)
    loss = average(losses, MASK, Whole(n_replies=4, n_tokens=10, max_tokens=8))

    inputs = {"prompt_ids": torch.ones(4, 2), "prompt_mask": torch.ones(4, 2), "completion_ids": torch.ones(4, 4)}
    inputs |= {"completion_mask": MASK.long(), "advantages": advantages, "old_per_token_logps": old_logps}
    inputs |= {"ref_per_token_logps": old_logps + ref, "num_items_in_batch": MASK.sum()}
    wanted = trl_loss(loss_type, theirs, inputs, epsilons, beta)
    torch.testing.assert_close(loss, wanted, atol=1e-6, rtol=0)
    loss.backward()
    wanted.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=0)
    assert theirs.grad.abs().max() > 1e-3
