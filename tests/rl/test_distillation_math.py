"""The arithmetic of distillation: by hand, against TRL's GKD, and in chunks."""

import math

import pytest
import torch
from trl.experimental.gkd import GKDTrainer

from medtune.rl import distillation_math
from medtune.rl.distillation_math import generalized_jsd, sampled_losses, token_divergences


def distributions(seed: int = 0, n: int = 6, vocabulary: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, vocabulary] logits of student and teacher."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(n, vocabulary, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher


def test_divergences_by_hand():
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    forward, reverse = 0.9 * math.log(1.8) + 0.1 * math.log(0.2), 0.5 * math.log(5 / 9) + 0.5 * math.log(5)
    # The mixture of 0.25: 0.6 and 0.4.
    middle = 0.25 * (0.9 * math.log(1.5) + 0.1 * math.log(0.25)) + 0.75 * (0.5 * math.log(5 / 6) + 0.5 * math.log(1.25))
    for beta, expected in ((0, forward), (1, reverse), (0.25, middle)):
        assert generalized_jsd(student, teacher, beta).item() == pytest.approx(expected, abs=1e-6), beta


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_divergence_and_gradient_are_those_of_trl(beta, temperature):
    student, teacher = distributions()
    theirs = GKDTrainer.generalized_jsd_loss(student[None], teacher[None], beta=beta, temperature=temperature)
    (expected,) = torch.autograd.grad(theirs, student)
    logps = [(logits / temperature).log_softmax(dim=-1) for logits in (student, teacher)]
    ours = generalized_jsd(*logps, beta).sum()
    # TRL divides by the rows of the batch, of which there is one.
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(ours, student)[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_student_that_is_its_teacher_has_no_divergence_and_no_gradient(beta):
    student, _ = distributions()
    divergence = generalized_jsd(student.log_softmax(dim=-1), student.detach().log_softmax(dim=-1), beta).sum()
    assert divergence.item() == pytest.approx(0, abs=1e-5)
    assert torch.autograd.grad(divergence, student)[0].abs().max() < 1e-6


def test_the_ends_are_limits():
    student, teacher = (logits.detach().double().log_softmax(dim=-1) for logits in distributions())
    for end, near in ((0, 1e-9), (1, 1 - 1e-9)):
        limit = generalized_jsd(student, teacher, near) / 1e-9
        torch.testing.assert_close(limit, generalized_jsd(student, teacher, end), rtol=1e-3, atol=1e-4)


def test_the_reward_is_an_estimate_of_the_reverse_kl_and_of_its_gradient():
    """Over all tokens, each as often as the student draws it, the mean is that of the whole distribution."""
    student, teacher = distributions(n=1)
    logps, teacher_logps = student.log_softmax(dim=-1), teacher.log_softmax(dim=-1)
    drawn = logps.detach().exp()
    losses = sampled_losses(logps, logps.detach(), teacher_logps)
    reverse_kl = generalized_jsd(logps, teacher_logps, 1.0).sum()
    assert (drawn * losses).sum().item() == pytest.approx(reverse_kl.item(), abs=1e-5)
    (estimated,) = torch.autograd.grad((drawn * losses).sum(), student, retain_graph=True)
    torch.testing.assert_close(estimated, torch.autograd.grad(reverse_kl, student)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("is_frozen", [True, False])
def test_divergences_in_chunks_with_heads_of_other_widths(monkeypatch, is_frozen):
    """As of a family whose larger models have more unused rows behind the vocabulary."""
    monkeypatch.setattr(distillation_math, "CHUNK", 4)
    generator = torch.Generator().manual_seed(1)
    states, teacher_states = torch.randn(10, 8, generator=generator), torch.randn(10, 16, generator=generator)
    weight, teacher_weight = torch.randn(20, 8, generator=generator), torch.randn(24, 16, generator=generator)
    states.requires_grad_()
    weight.requires_grad_(not is_frozen)
    rows_at_a_time = []

    def head(part: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows_at_a_time.append(len(part))
        return part @ weight.T

    heads = (lambda part: head(part, weight)), (lambda part: head(part, teacher_weight))
    divergences, kl = token_divergences(states, heads[0], teacher_states, heads[1], 0.7, 0.3, is_frozen)
    divergences.sum().backward()
    assert max(rows_at_a_time) == 4, "no more logits at a time than those of a chunk"

    whole = states.detach().clone().requires_grad_()
    logits = whole @ weight.detach().T, (teacher_states @ teacher_weight.T)[:, :20]
    student, teacher = ((each / 0.7).log_softmax(dim=-1) for each in logits)
    expected = generalized_jsd(student, teacher, 0.3)
    expected.sum().backward()
    torch.testing.assert_close(divergences, expected)
    torch.testing.assert_close(kl, generalized_jsd(student, teacher, 1.0))
    torch.testing.assert_close(states.grad, whole.grad, atol=1e-5, rtol=1e-4)
    assert (weight.grad is None) == is_frozen
