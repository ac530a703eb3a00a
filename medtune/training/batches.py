"""Collate rows of ids into right-padded batches of tensors, with the records' `file:line`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence


def pad_right(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """[rows, longest] int64."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def reply_batch(prompts: Sequence[list[int]], replies: Sequence[list[int]], pad_token_id: int) -> dict:
    """A batch of N prompts with replies: `input_ids` and `attention_mask` int64, `reply_mask` bool, [N, longest]."""
    texts = [prompt + reply for prompt, reply in zip(prompts, replies, strict=True)]
    lengths = torch.tensor([len(text) for text in texts])
    starts = torch.tensor([len(prompt) for prompt in prompts])
    positions = torch.arange(int(lengths.max()))
    is_real = positions < lengths[:, None]
    return {
        "input_ids": pad_right(texts, pad_token_id),
        "attention_mask": is_real.long(),
        "reply_mask": is_real & (positions >= starts[:, None]),
    }


@dataclass
class PairCollator:
    """Batches pairs by `reply_batch`: all chosen replies, then all rejected ones; a missing margin is 0."""

    pad_token_id: int

    def __call__(self, rows: Sequence[dict]) -> dict:
        prompts = [row["prompt_ids"] for row in rows]
        replies = [row[name] for name in ("chosen_ids", "rejected_ids") for row in rows]
        batch = reply_batch(prompts * 2, replies, self.pad_token_id)
        batch["margin"] = torch.tensor([row.get("margin", 0.0) for row in rows]).nan_to_num(nan=0.0)
        if "ref_chosen_logps" in rows[0]:
            batch["ref_logps"] = torch.tensor(
                [row[name] for name in ("ref_chosen_logps", "ref_rejected_logps") for row in rows]
            )
        return batch | {"sources": [row["source"] for row in rows]}


@dataclass
class FeedbackCollator:
    """Batches by `reply_batch`: prompts with their own replies, then with mismatched ones; `is_desirable` bool."""

    pad_token_id: int

    def __call__(self, rows: Sequence[dict]) -> dict:
        prompts = [row["prompt_ids"] for row in rows]
        replies = [row[name] for name in ("reply_ids", "mismatched_ids") for row in rows]
        batch = reply_batch(prompts * 2, replies, self.pad_token_id)
        batch["is_desirable"] = torch.tensor([row["is_desirable"] for row in rows])
        if "ref_logps" in rows[0]:
            batch["ref_logps"] = torch.tensor(
                [row[name] for name in ("ref_logps", "ref_mismatched_logps") for row in rows]
            )
        return batch | {"sources": [row["source"] for row in rows]}
