"""Sampling, and rollouts as tensors that join and part."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from transformers import TrainingArguments

from medtune.arguments import LoraArguments
from medtune.rl.ppo_math import draw_uniforms, episode_order, inverse_transform
from medtune.rl.roles import load_roles
from medtune.rl.rollout import Rollout, Sampling, collect_replies
from medtune.training.interruption import SignalListener


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


# ---------------------------------------------------------------- groups


@pytest.fixture
def replies_and_tokens(tiny_model_dir, tmp_path) -> Callable:
    """A function from prompts and episodes to replies, and the tokens of each forward pass that made them."""
    roles, _ = load_roles(str(tiny_model_dir), None, LoraArguments(), torch.device("cpu"), with_value=False)
    stop = SignalListener(TrainingArguments(output_dir=str(tmp_path), use_cpu=True))

    def collect(prompts: list[list[int]], episodes: list[int] | None, batch_size: int) -> tuple[list, list[int]]:
        counts: list[int] = []
        hook = roles.model.get_base_model().register_forward_pre_hook(
            lambda _, args, inputs: counts.append(inputs["input_ids"].numel()), with_kwargs=True
        )
        rows = [{"prompt_ids": prompt} for prompt in prompts]
        replies = collect_replies(roles, rows, episodes, Sampling(1.0, 6, batch_size, [599], 0, seed=42), stop)
        hook.remove()
        return replies.reply_ids(), counts

    return collect


def of_prompts(counts: list[int], batch_size: int) -> int:
    """The tokens of the passes over prompts; those after them have a token a row, of fewer rows each time."""
    before = [0, *counts]
    return sum(now for last, now in pairwise(before) if now > last or now > batch_size)


def test_a_prompt_is_computed_once_for_the_replies_of_its_group(replies_and_tokens, monkeypatch):
    """The replies are those of rows that are computed each for itself, as where a cache cannot be repeated."""
    prompts = [[*range(20, 32)], [*range(40, 52)], [7, 8, 9]]
    rows, episodes = [prompt for prompt in prompts for _ in range(8)], [*range(24)]
    replies, counts = replies_and_tokens(rows, episodes, 24)
    assert len(set(map(tuple, replies[:8]))) > 4, "each is drawn by its episode"
    with monkeypatch.context() as patch:
        patch.setattr("medtune.models.running_batch.KNOWN_LAYERS", set())
        each, each_counts = replies_and_tokens(rows, episodes, 24)
    assert replies == each
    assert 8 * of_prompts(counts, 24) == of_prompts(each_counts, 24) == 24 * 12
    # PPO's prompts that come again, not beside each other: each batch holds whole groups all the same.
    mixed = [prompts[number % 2] for number in range(16)]
    repeated, counts = replies_and_tokens(mixed, episodes[:16], 8)
    assert of_prompts(counts, 8) == 2 * 12
    assert repeated == replies_and_tokens(mixed, episodes[:16], 1)[0]
