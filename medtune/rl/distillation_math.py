"""The arithmetic of on-policy distillation: a reward of sampled tokens, or a divergence of whole distributions.

Tensors in, tensors out. p_T and p_S are the teacher's and the student's distribution of the next token; log-probs and
divergences are in nats.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from medtune.models.logps import in_chunks
from medtune.rl.ppo_math import CHUNK


def sampled_losses(logps: torch.Tensor, old_logps: torch.Tensor, teacher_logps: torch.Tensor) -> torch.Tensor:
    """[B, T] losses -r_t (log p_T(y_t) - log p_S(y_t)) of tokens y that the student drew, with r_t = p_S / p_S,old.

    The reward is an estimate of -KL(p_S || p_T) from a single token, and the gradient one of its gradient (Lu and
    Thinking Machines 2025, https://thinkingmachines.ai/blog/on-policy-distillation; Gu et al. 2024, "MiniLLM",
    https://arxiv.org/abs/2306.08543, section 2.2). A token has its own reward alone, none of those behind it.

    Args:
        logps: [B, T] of the student, with a gradient.
        old_logps, teacher_logps: [B, T] without.
    """
    rewards = teacher_logps - old_logps
    return -(logps - old_logps).exp() * rewards


def generalized_jsd(student_logps: torch.Tensor, teacher_logps: torch.Tensor, beta: float) -> torch.Tensor:
    """[N] divergences beta KL(p_T || m) + (1 - beta) KL(p_S || m) of [N, V] log-probs, m = beta p_T + (1 - beta) p_S.

    Agarwal et al. 2024, "GKD", https://arxiv.org/abs/2306.13649, equation 1. Both ends would be 0; there stands what
    the divergence over beta, or over 1 - beta, tends to: KL(p_T || p_S) for beta 0, KL(p_S || p_T) for 1.
    """
    if beta in (0, 1):
        of, other = (teacher_logps, student_logps) if beta == 0 else (student_logps, teacher_logps)
        return _kl(of, other)
    mixture = torch.logaddexp(teacher_logps + math.log(beta), student_logps + math.log(1 - beta))
    return beta * _kl(teacher_logps, mixture) + (1 - beta) * _kl(student_logps, mixture)


def _kl(logps: torch.Tensor, other_logps: torch.Tensor) -> torch.Tensor:
    return (logps.exp() * (logps - other_logps)).sum(dim=-1)


Head = Callable[[torch.Tensor], torch.Tensor]


def token_divergences(
    states: torch.Tensor,
    head: Head,
    teacher_states: torch.Tensor,
    teacher_head: Head,
    temperature: float,
    beta: float,
    is_frozen: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`generalized_jsd` at each position, and KL(p_S || p_T), without logits of either model of more than CHUNK rows.

    Embeddings may have unused rows behind the vocabulary, in larger models of a family more of them: the distributions
    are those over the ids that both have.

    Args:
        states, teacher_states: [N, H] and [N, H_T], that predict the same tokens; each model on its own device.
        head, teacher_head: to [n, V] and [n, V_T] logits.
        temperature: divides the logits of both, as in sampling.
        is_frozen: the student's head has no gradient.

    Returns:
        [N] float32 each; the KL carries no gradient.
    """

    def compute(logits: torch.Tensor, teacher_states: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            teacher_logits = teacher_head(teacher_states).to(logits.device)
        n_ids = min(logits.shape[1], teacher_logits.shape[1])
        both = (logits, teacher_logits)
        student, teacher = (F.log_softmax(each[:, :n_ids].float() / temperature, dim=-1) for each in both)
        return torch.stack([generalized_jsd(student, teacher, beta), _kl(student.detach(), teacher)])

    return tuple(in_chunks(head, states, teacher_states, compute, CHUNK, is_frozen))
