"""Batches without padding: their rows joined into one, in which each text sees itself alone.

transformers' SDPA multiplies all pairs of tokens of a row and masks those of different texts. `attention_by_text`
costs what the texts cost, as FlashAttention does. Both also take texts whose common prefix stands in the row once, as
the prompt of two replies: all layers but attention then compute it once.
"""

from collections.abc import Callable
from enum import Enum
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SDPA, SDPA_BY_TEXT = "sdpa", "sdpa_by_text"
FLASH_ATTENTION = ("flash_attention_2", "flash_attention_3")
# Tokens from which on a common prefix passes once: gathering its keys costs a step what about ten tokens do.
LEAST_SHARED = 16
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


class Layout(Enum):
    """How the rows of a batch pass through a model."""

    PADDED = "padded"
    JOINED = "joined"  # into one row
    SHARED_PREFIXES = "shared prefixes"  # joined, and a prefix that texts have in common is there once


def attention_by_text(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    text_columns: torch.Tensor | None = None,
    own_tokens: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' SDPA, text by text: [1, tokens, heads, head size].

    Args:
        query, key, value: [1, heads, tokens, head size]; key and value may have fewer heads.
        attention_mask: [1, 1, tokens, tokens], whose blocks of two different texts are never read; None if causal.
        cu_seq_lens_q: [texts + 1] int, where the texts begin, and the end; None for plain SDPA.
        text_columns: [tokens of all texts] int64, the texts one after another as columns of the row; None if the row is
            that already.
        own_tokens: [tokens] int64, which of these are the columns of the row.

    Raises:
        ValueError: a mask, which goes by distances in the row, for texts that share a prefix.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if text_columns is not None:
        if attention_mask is not None:
            raise ValueError("a mask does not keep packed sequences apart that share a prefix")
        query, key, value = (states.index_select(2, text_columns) for states in (query, key, value))
    borders = cu_seq_lens_q.tolist()
    outputs = []
    for start, end in pairwise(borders):
        text = slice(start, end)
        mask = None if attention_mask is None else attention_mask[..., text, text]
        parts = (states[:, :, text] for states in (query, key, value))
        outputs.append(sdpa_attention_forward(module, *parts, mask, **kwargs)[0])
    output = torch.cat(outputs, dim=1)
    return (output if own_tokens is None else output.index_select(1, own_tokens)), None


def flash_attention_by_text(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    text_columns: torch.Tensor | None = None,
    own_tokens: torch.Tensor | None = None,
    attend: Callable = flash_attention_forward,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' FlashAttention, which takes the borders of texts itself, for texts that share a prefix too: as
    `attention_by_text`.

    attend: what stands for FlashAttention where nothing is computed.
    """
    if text_columns is None:
        return attend(module, query, key, value, attention_mask, **kwargs)
    texts = (states.index_select(2, text_columns) for states in (query, key, value))
    output, _ = attend(module, *texts, attention_mask, **kwargs)
    return output.index_select(1, own_tokens), None


def mask_by_text(
    *,
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    **kwargs,
) -> torch.Tensor | None:
    """transformers' mask for SDPA; None, which is causal, where only the borders of texts would make it another one."""
    if attention_mask is None and q_length == kv_length:
        if local_size is None:
            return None
        kwargs["allow_is_causal_skip"] = False  # a window shows in short rows too, of which texts may share prefixes
    return sdpa_mask(
        q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, local_size=local_size, **kwargs
    )


AttentionInterface.register(SDPA_BY_TEXT, attention_by_text)
AttentionMaskInterface.register(SDPA_BY_TEXT, mask_by_text)
for name in FLASH_ATTENTION:  # which stays what it is for rows that share nothing
    AttentionInterface.register(name, flash_attention_by_text)


def attend_by_text(model: PreTrainedModel, by_text: bool = True) -> None:
    """Switch a model from SDPA to `attention_by_text`, or back; another attention stays."""
    before, after = (SDPA, SDPA_BY_TEXT) if by_text else (SDPA_BY_TEXT, SDPA)
    if model.config._attn_implementation == before:
        model.set_attn_implementation(after)


def has_recurrent_layers(model_class: type[PreTrainedModel], config: PretrainedConfig) -> bool:
    """Whether layers besides attention carry something along a row: states, or a convolution's last tokens."""
    layer_types = getattr(config.get_text_config(), "layer_types", None)
    return bool(set(layer_types) - ATTENTION_LAYERS) if layer_types else model_class._is_stateful


def gains_from_joining(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether a batch was measured to be faster as one row: with FlashAttention, which takes borders, and on a CPU.

    False for models with recurrent layers, most of which would carry their state from text to text.
    """
    attention = model.config._attn_implementation
    takes_borders = "flash" in attention or (attention in (SDPA, SDPA_BY_TEXT) and device.type == "cpu")
    return takes_borders and not has_recurrent_layers(type(model), model.config)


def asks_to_join(padding_free: str, model: PreTrainedModel, device: torch.device) -> bool:
    """Whether to join rows if the model keeps them apart: by --padding_free, with auto where that gains."""
    return gains_from_joining(model, device) if padding_free == "auto" else padding_free == "True"


def border_fault(error: ValueError) -> str:
    """What a layer that cannot keep texts apart says in transformers 5.24, and here; another error is raised."""
    if "packed sequences apart" not in str(error):
        raise error
    return str(error).partition(". ")[0]


def shares_prefixes(model: PreTrainedModel) -> bool:
    """Whether texts whose common prefix stands in the row once can be told apart: all layers attend by text, to all of
    it. A window, a convolution or a recurrent state would go by the order of the row.
    """
    layer_types = getattr(model.config.get_text_config(), "layer_types", None)
    takes_prefixes = model.config._attn_implementation in (SDPA_BY_TEXT, *FLASH_ATTENTION)
    return takes_prefixes and set(layer_types or ()) <= {"full_attention"}


def joined_layout(model: PreTrainedModel) -> Layout:
    """How joined rows pass through a model that attends by text: with their common prefixes once, where it can."""
    return Layout.SHARED_PREFIXES if shares_prefixes(model) else Layout.JOINED


def exact_layout(model: PreTrainedModel, figures: Callable[[Layout], torch.Tensor], rounding: float) -> Layout:
    """Joined rows where they are faster, and a few rows have the same figures joined and padded; otherwise padded rows.

    Args:
        figures: of the few rows in a layout.
        rounding: by which these may differ in the mean.
    """
    if not gains_from_joining(model, model.device):
        return Layout.PADDED
    padded = figures(Layout.PADDED)
    attend_by_text(model)
    layout = joined_layout(model)
    try:
        if (figures(layout) - padded).abs().mean() <= rounding:
            return layout
    except ValueError as error:
        border_fault(error)
    attend_by_text(model, False)
    return Layout.PADDED


# ---------------------------------------------------------------- rows without padding


def forward_inputs(batch: dict[str, torch.Tensor], layout: Layout) -> dict[str, torch.Tensor | int]:
    """Keywords of a model's forward pass for a batch of padded rows in a layout; `places` tells where their tokens are.

    Args:
        batch: `input_ids` and `attention_mask`, [rows, length] int64, with `position_ids` like them if rows hold
            several texts, in each of which they begin at 0; such texts share no prefixes.
    """
    ids, attention_mask, positions = (batch.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    if layout is Layout.PADDED:
        # With a mask transformers 5.24 would let the texts of a row see each other.
        return {"input_ids": ids} | (
            {"attention_mask": attention_mask} if positions is None else {"position_ids": positions}
        )
    is_token = attention_mask.bool()
    columns, is_own = _join(batch, layout)
    positions = attention_mask.cumsum(dim=1) - 1 if positions is None else positions
    starts = (positions[is_token] == 0).nonzero().flatten()
    borders = F.pad(starts, (0, 1), value=int(is_token.sum())).int()
    lengths = borders.diff()
    longest = int(lengths.max())
    own_tokens = is_own[is_token].nonzero().flatten()
    texts = torch.arange(len(lengths), dtype=torch.int32, device=ids.device).repeat_interleave(lengths)
    # The borders in the forms that attention and convolutions ask for.
    inputs = {
        "input_ids": ids[is_own][None],
        "position_ids": positions[is_own][None],
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": texts[own_tokens][None],
    }
    shared = {"text_columns": columns[is_token], "own_tokens": own_tokens}
    return inputs | shared if layout is Layout.SHARED_PREFIXES else inputs


def places(mask: torch.Tensor, batch: dict[str, torch.Tensor], layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns, [N] int64 each, at which a batch's `forward_inputs` have the N tokens of its mask.

    mask: [rows, length] bool.
    """
    rows, columns = mask.nonzero(as_tuple=True)
    if layout is Layout.PADDED:
        return rows, columns
    return torch.zeros_like(rows), _join(batch, layout)[0][mask]


def _join(batch: dict[str, torch.Tensor], layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, length] each: int64 the column of each token in the joined row, and True where it is its row's own."""
    ids, is_own = batch["input_ids"], batch["attention_mask"].bool()
    if layout is Layout.JOINED or "position_ids" in batch:
        return _count(is_own), is_own
    agrees = (ids[:, None] == ids) & (is_own[:, None] == is_own)
    n_common = (agrees.cumprod(dim=2, dtype=torch.int8) * is_own).sum(dim=2).tril(-1)  # with each earlier row
    n_shared, sharers = n_common.max(dim=1)
    n_shared[n_shared < LEAST_SHARED] = 0
    is_own = is_own & (is_own.cumsum(dim=1) > n_shared[:, None])
    columns = _count(is_own)
    for row, earlier in enumerate(sharers.tolist()):
        columns[row] = columns[row].where(is_own[row], columns[earlier])
    return columns, is_own


def _count(mask: torch.Tensor) -> torch.Tensor:
    """How many are True before each that is, in the order of the rows."""
    return (mask.flatten().cumsum(dim=0) - 1).view(mask.shape)
