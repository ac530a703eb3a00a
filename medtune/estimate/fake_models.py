"""Models whose base has no memory: fake weights of the true shapes and types, under real adapters and heads.

A model is made with a few of its layers. Layers are alike, so what all of them take lies on the straight line through
two such depths (`medtune.estimate.memory`).
"""

import copy
from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from medtune.estimate.shapes import shallow
from medtune.models.score_heads import ScoreHead, register_scoring_class

FLASH = "flash_for_the_estimate"
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


def _flash_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None, **kwargs
) -> tuple[torch.Tensor, None]:
    """What FlashAttention keeps for the backward pass, whatever the borders of the texts: [B, heads, tokens, size]."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attend(query, key, value, 0.0, True)[0].transpose(1, 2).contiguous(), None


AttentionInterface.register(FLASH, _flash_attention)
AttentionMaskInterface.register(FLASH, lambda **kwargs: None)


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
        flash: FlashAttention, otherwise the model's own choice, which is SDPA where it can have it.
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
    if flash:
        base.config._attn_implementation = FLASH
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
