"""Sampling, and rollouts as tensors that join and part."""

import torch

from medtune.rl.ppo_math import draw_uniforms, episode_order, inverse_transform
from medtune.rl.rollout import Rollout


def test_draws_follow_the_tempered_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, -50.0]]).repeat(4000, 1)
    uniforms = [draw_uniforms(1, seed=3, episode=number)[0] for number in range(4000)]
    shares = torch.bincount(inverse_transform(logits, uniforms, temperature=0.5), minlength=4) / 4000
    torch.testing.assert_close(shares, (logits[0] / 0.5).softmax(dim=0), atol=0.02, rtol=0)
    # By hand: cumulative 0.25, 0.75, 1 and the numbers 0.2, 0.25, 0.74, 0.99.
    chances = torch.tensor([0.25, 0.5, 0.25]).log().repeat(4, 1)
    assert inverse_transform(chances, [0.2, 0.25, 0.74, 0.99], 1.0).tolist() == [0, 1, 1, 2]


def test_a_draw_belongs_to_its_episode():
    assert draw_uniforms(5, 42, 4)[:3] == draw_uniforms(3, 42, 4)
    assert draw_uniforms(5, 42, 3) != draw_uniforms(5, 42, 4) != draw_uniforms(5, 43, 3)


def test_every_prompt_comes_once_before_one_comes_again():
    order = episode_order(5, 12, seed=1)
    assert sorted(order[:5]) == sorted(order[5:10]) == [0, 1, 2, 3, 4]
    assert order[:5] != order[5:10]
    assert episode_order(5, 7, seed=1) == order[:7]


def test_rollouts_join_and_part_without_loss():
    def make(n_prompt: int, n_reply: int, value: float) -> Rollout:
        attention = torch.ones(1, n_prompt + n_reply, dtype=torch.bool)
        per_token = torch.full((1, n_reply), value)
        mask = torch.ones(1, n_reply, dtype=torch.bool)
        return Rollout(
            ids=torch.arange(n_prompt + n_reply)[None],
            attention_mask=attention,
            mask=mask,
            ended=torch.tensor([True]),
            sampler_logps=per_token,
            policy_logps=per_token,
            ref_logps=per_token,
            values=per_token,
            entropies=per_token,
            variances=per_token,
            rewards=torch.full((1, 3), value),
            scores=torch.tensor([value]),
        )

    parts = [make(2, 4, 1.0), make(5, 1, 2.0)]
    joined = Rollout.join(parts)
    assert joined.ids.tolist() == [[0, 0, 0, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 0, 0, 0]]
    assert joined.reply_ids() == [[2, 3, 4, 5], [5]]
    for row, part in enumerate(parts):
        taken = joined.take(torch.tensor([row]))
        for name, tensor in vars(part).items():
            assert torch.equal(getattr(taken, name), tensor), name
