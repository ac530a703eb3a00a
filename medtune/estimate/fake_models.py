"""Models whose base has no memory: fake weights of the true shapes and types, under real adapters and heads.

A model is made with a few of its layers. Layers are alike, so what all of them take lies on the straight line through
two such depths (`medtune.estimate.memory`).
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from medtune.estimate.shapes import shallow
from medtune.models.score_heads import ScoreHead, register_scoring_class
from medtune.models.text_attention import FLASH_ATTENTION, flash_attention_by_text

# Weights that share a scale in 4-bit NF4, and scales that share one of their own (QLoRA, Dettmers et al. 2023).
SCALED, SCALES_SCALED = 64, 256


# ---------------------------------------------------------------- quantized layers


class QuantizedLinear(nn.Linear):
    """A frozen linear layer in 4 or 8 bits, as large as bitsandbytes 0.50 keeps it, with its scales."""

    def __init__(self, layer: nn.Linear, bits: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bits = layer.in_features, layer.out_features, bits
        n_weights = layer.in_features * layer.out_features
        n_scales = (
            n_weights // SCALED + 4 * (n_weights // SCALED // SCALES_SCALED) if bits == 4 else 4 * self.out_features
        )
        like = layer.weight.new_empty
        self.weight = nn.Parameter(like(n_weights * bits // 8, 1, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("scales", like(n_scales, dtype=torch.uint8))
        self.bias = layer.bias

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        return self.weight.new_empty(self.out_features, self.in_features, dtype=dtype)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(states.device.type):
            states = states.to(torch.get_autocast_dtype(states.device.type))
        return _QuantizedProduct.apply(states, self)


class _QuantizedProduct(torch.autograd.Function):
    """The weights are made whole for each product, in the forward and in the backward pass. In 8 bits the states are
    kept, in 4 bits they are not.
    """

    @staticmethod
    def forward(ctx, states: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
        ctx.layer, ctx.dtype = layer, states.dtype
        ctx.kept = states if layer.bits == 8 else None
        bias = None if layer.bias is None else layer.bias.to(states.dtype)
        return F.linear(states, layer.dequantized(states.dtype), bias)

    @staticmethod
    def backward(ctx, of_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        return of_output.to(ctx.dtype) @ ctx.layer.dequantized(ctx.dtype), None


# ---------------------------------------------------------------- FlashAttention


class _FlashAttention(torch.autograd.Function):
    """What FlashAttention 2 keeps and makes, and the operations of each text alone: [B, tokens, heads, size]."""

    @staticmethod
    def forward(
        ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, borders: list[int] | None
    ) -> torch.Tensor:
        ctx.texts = [slice(None)] if borders is None else [slice(*text) for text in pairwise(borders)]
        for text in ctx.texts:  # to be counted
            parts = (states[:, :, text] for states in (query, key, value))
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*parts, 0.0, True)
        n_rows, n_heads, n_tokens, _ = query.shape
        output = query.new_empty(n_rows, n_tokens, n_heads, value.shape[-1])
        sums = query.new_empty(n_rows, n_heads, n_tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx, of_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, sums = ctx.saved_tensors
        gradients = tuple(torch.empty_like(states) for states in (query, key, value))
        # Its workspace: sums of the queries' gradients, and those of keys and values for each head of the queries.
        workspace = [torch.empty_like(query, dtype=torch.float32)]
        if key.shape[1] < query.shape[1]:
            workspace += [torch.empty_like(query), query.new_empty(*query.shape[:3], value.shape[-1])]
        for text in ctx.texts:
            states = (of_output.transpose(1, 2), query, key, value, output.transpose(1, 2))
            parts = (each[:, :, text] for each in (*states, sums))
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*parts, 0.0, True)
        return *gradients, None


def _flash_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """In place of transformers' `flash_attention_forward`."""
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (states.to(dtype) for states in (query, key, value))
    borders = None if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    return _FlashAttention.apply(query, key, value, borders), None


@contextmanager
def without_flash_kernels() -> Iterator[None]:
    """FlashAttention under its own name, by which a stage decides, and without its kernels."""
    name = FLASH_ATTENTION[0]
    own = AttentionInterface()[name]
    AttentionInterface.register(name, partial(flash_attention_by_text, attend=_flash_attention))
    try:
        yield
    finally:
        AttentionInterface.register(name, own)


# ---------------------------------------------------------------- what CUDA does otherwise than a CPU


def drop_out_as_on_cuda(model: nn.Module) -> None:
    """Let dropout keep a mask of a byte a value, as CUDA's kernel does, and not the noise that a CPU keeps."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.forward = partial(_cuda_dropout, module)


def _cuda_dropout(module: nn.Dropout, states: torch.Tensor) -> torch.Tensor:
    if not module.training or not module.p:
        return states
    return torch.native_dropout(states, module.p, True)[0]


# ---------------------------------------------------------------- models


def fake_base(
    config: PretrainedConfig,
    n_layers: int,
    dtype: torch.dtype,
    *,
    bits: int = 16,
    flash: bool = False,
    scores: bool = False,
) -> PreTrainedModel:
    """A base model with fake weights.

    Args:
        bits: 4 or 8 quantizes all linear layers but the head.
        flash: FlashAttention if the model can have it, to be run `without_flash_kernels`; otherwise the model's own
            choice, which is SDPA where it can have it.
        scores: with a score head in the place of the language model's.
    """
    config = shallow(config, n_layers)
    auto_class = AutoModelForCausalLM
    if scores:
        auto_class, config.num_labels = AutoModelForSequenceClassification, 1
        register_scoring_class(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        base = auto_class.from_config(config, dtype=dtype, attn_implementation=None)
        if bits < 16:
            for name, layer in list(base.named_modules()):
                if type(layer) is nn.Linear and name.rpartition(".")[2] not in ("lm_head", "score"):
                    base.set_submodule(name, QuantizedLinear(layer, bits))
    if scores:
        base.score = ScoreHead(base.score.in_features, 1, bias=False, dtype=torch.float32)
        base.config.get_text_config().pad_token_id = 0
    if flash and base._supports_flash_attn:
        base.config._attn_implementation = FLASH_ATTENTION[0]
    # A trainer moves its model to a device, on which fake weights are wherever it is.
    base._apply = lambda *args, **kwargs: base
    return base


def with_adapters(
    base: PreTrainedModel, lora_config: LoraConfig, others: Mapping[str, LoraConfig] | None = None
) -> PeftModel:
    """The base with its trained adapter, and others by name, which are frozen until they are used."""
    model = get_peft_model(base, lora_config)
    for name, config in (others or {}).items():
        config = copy.deepcopy(config)
        config.task_type, config.lora_dropout, config.inference_mode = lora_config.task_type, 0.0, False
        model.add_adapter(name, config)
        for key, weights in model.named_parameters():
            if name in key.split(".")[-2:]:
                weights.requires_grad_(False)
    return model
