"""Batches without padding: their rows joined into one, in which each text sees itself alone.

transformers' SDPA multiplies all pairs of tokens of a row and masks those of different texts. `attention_by_text`
costs what the texts cost.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SDPA, SDPA_BY_TEXT = "sdpa", "sdpa_by_text"


def attention_by_text(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' SDPA, text by text: [1, tokens, heads, head size].

    Args:
        query, key, value: [1, heads, tokens, head size]; key and value may have fewer heads.
        attention_mask: [1, 1, tokens, tokens], whose blocks of two different texts are never read; None if causal.
        cu_seq_lens_q: [texts + 1] int, where the texts begin, and the end; None for plain SDPA.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    borders = cu_seq_lens_q.tolist()
    outputs = []
    for start, end in pairwise(borders):
        text = slice(start, end)
        mask = None if attention_mask is None else attention_mask[..., text, text]
        parts = (states[:, :, text] for states in (query, key, value))
        outputs.append(sdpa_attention_forward(module, *parts, mask, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


def mask_by_text(
    *,
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    **kwargs,
) -> torch.Tensor | None:
    """transformers' mask for SDPA; None, which is causal, where only the borders of texts would make it another one."""
    if attention_mask is None and local_size is None and q_length == kv_length:
        return None
    return sdpa_mask(
        q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, local_size=local_size, **kwargs
    )


AttentionInterface.register(SDPA_BY_TEXT, attention_by_text)
AttentionMaskInterface.register(SDPA_BY_TEXT, mask_by_text)


def attend_by_text(model: PreTrainedModel, by_text: bool = True) -> None:
    """Switch a model from SDPA to `attention_by_text`, or back; another attention stays."""
    before, after = (SDPA, SDPA_BY_TEXT) if by_text else (SDPA_BY_TEXT, SDPA)
    if model.config._attn_implementation == before:
        model.set_attn_implementation(after)


def gains_from_joining(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether a batch was measured to be faster as one row: with FlashAttention, which takes borders, and on a CPU.

    False for models with recurrent layers too, which would carry their state from text to text.
    """
    attention = model.config._attn_implementation
    takes_borders = "flash" in attention or (attention == SDPA and device.type == "cpu")
    return takes_borders and not model._is_stateful


# ---------------------------------------------------------------- rows without padding


def forward_inputs(batch: dict[str, torch.Tensor], padding_free: bool) -> dict[str, torch.Tensor | int]:
    """Keywords of a model's forward pass for a batch of padded rows; `padding_free` joins them into one row.

    In that row, [1, tokens], the tokens stand in the order of `attention_mask`'s ones.

    Args:
        batch: `input_ids` and `attention_mask`, [rows, length] int64, with `position_ids` like them if rows hold
            several texts, in each of which they begin at 0.
    """
    ids, attention_mask, positions = (batch.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    if not padding_free:
        # With a mask transformers 5.24 would let the texts of a row see each other.
        return {"input_ids": ids} | (
            {"attention_mask": attention_mask} if positions is None else {"position_ids": positions}
        )
    is_token = attention_mask.bool()
    positions = (attention_mask.cumsum(dim=1) - 1 if positions is None else positions)[is_token]
    borders = F.pad((positions == 0).nonzero().flatten(), (0, 1), value=len(positions)).int()
    lengths = borders.diff()
    longest = int(lengths.max())
    # The borders in the forms that attention and convolutions ask for.
    return {
        "input_ids": ids[is_token][None],
        "position_ids": positions[None],
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": torch.arange(len(lengths), dtype=torch.int32, device=ids.device).repeat_interleave(lengths)[None],
    }


def of_tokens(values: torch.Tensor, batch: dict[str, torch.Tensor], padding_free: bool) -> torch.Tensor:
    """[rows, length] values of a batch's tokens in the shape of its `forward_inputs`."""
    return values[batch["attention_mask"].bool()][None] if padding_free else values
