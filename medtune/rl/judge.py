"""Reward replies, whoever sampled them: from token ids to what the rewards read."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from medtune.rl.reward_texts import RewardTexts
from medtune.rl.rewards import Rewards, ScoredReply, scored_replies
from medtune.rl.roles import Roles
from medtune.rl.rollout import Replies, score_texts


@dataclass(frozen=True)
class Judge:
    """The rewards of the flags, and how a reply's ids are read for them.

    reward_texts: what the reward model reads; None where it is not among the rewards.
    batch_size: replies that the reward model scores at a time.
    """

    rewards: Rewards
    tokenizer: PreTrainedTokenizerBase
    reward_texts: RewardTexts | None
    batch_size: int

    def read(self, rows: Sequence[dict], replies: Replies) -> list[ScoredReply]:
        """The replies to rows of `PromptEncoder` as text."""
        return scored_replies(self.tokenizer, rows, replies.reply_ids(), replies.ended.tolist())

    def __call__(self, roles: Roles, rows: Sequence[dict], replies: Replies) -> torch.Tensor:
        """[N, K] float32 rewards, not weighted."""
        scores = None
        if self.reward_texts is not None:
            rows_and_ids = zip(rows, replies.reply_ids(), strict=True)
            texts = [self.reward_texts.of_ids(row, ids) for row, ids in rows_and_ids]
            scores = score_texts(roles, texts, self.batch_size) - roles.score_shift
        return self.rewards(self.read(rows, replies), scores)
