"""A model before it is downloaded: its configuration from its folder, the hub, or a table of known shapes, and its
weights as they stand on the meta device.
"""

import copy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from medtune.errors import UserError
from medtune.models.loading import load_config
from medtune.models.text_part import language_model_class, loaded_config
from medtune.models.weight_headers import read_headers

_QWEN2 = {"model_type": "qwen2", "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 32768}
_QWEN2_LARGE = _QWEN2 | {"vocab_size": 152064, "tie_word_embeddings": False}
_QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, "max_position_embeddings": 40960}
_LLAMA = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072}
_GEMMA2 = {"model_type": "gemma2", "vocab_size": 256000}
_QWEN3_MOE = _QWEN3 | {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8}
_QWEN3_5 = {"model_type": "qwen3_5_text", "vocab_size": 248320, "head_dim": 256, "max_position_embeddings": 262144}
_QWEN3_5_MOE = _QWEN3_5 | {"model_type": "qwen3_5_moe_text", "num_experts": 256, "num_experts_per_tok": 8}
_GEMMA3 = {"model_type": "gemma3_text", "vocab_size": 262144, "max_position_embeddings": 32768}
_GEMMA4 = {"model_type": "gemma4_text", "vocab_size": 262144, "head_dim": 256, "final_logit_softcapping": 30.0}


def _shape(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, of_family: dict, **others
) -> dict[str, object]:
    return (
        of_family
        | {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
        | {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
        | others
    )


# By the last part of the hub's name in lower case, without -instruct, -it, -base and the date.
SHAPES = {
    "qwen2.5-0.5b": _shape(896, 4864, 24, 14, 2, _QWEN2),
    "qwen2.5-1.5b": _shape(1536, 8960, 28, 12, 2, _QWEN2),
    "qwen2.5-3b": _shape(2048, 11008, 36, 16, 2, _QWEN2),
    "qwen2.5-7b": _shape(3584, 18944, 28, 28, 4, _QWEN2_LARGE),
    "qwen2.5-14b": _shape(5120, 13824, 48, 40, 8, _QWEN2_LARGE),
    "qwen3-0.6b": _shape(1024, 3072, 28, 16, 8, _QWEN3, tie_word_embeddings=True),
    "qwen3-1.7b": _shape(2048, 6144, 28, 16, 8, _QWEN3, tie_word_embeddings=True),
    "qwen3-4b": _shape(2560, 9728, 36, 32, 8, _QWEN3, tie_word_embeddings=True),
    "qwen3-8b": _shape(4096, 12288, 36, 32, 8, _QWEN3, tie_word_embeddings=False),
    "qwen3-14b": _shape(5120, 17408, 40, 40, 8, _QWEN3, tie_word_embeddings=False),
    "qwen3-32b": _shape(5120, 25600, 64, 64, 8, _QWEN3, tie_word_embeddings=False),
    "qwen3-30b-a3b": _shape(2048, 6144, 48, 32, 4, _QWEN3_MOE, moe_intermediate_size=768, tie_word_embeddings=False),
    "qwen3.5-0.8b": _shape(1024, 3584, 24, 8, 2, _QWEN3_5, linear_num_value_heads=16, tie_word_embeddings=True),
    "qwen3.5-4b": _shape(2560, 9216, 32, 16, 4, _QWEN3_5, linear_num_value_heads=32, tie_word_embeddings=True),
    "qwen3.5-9b": _shape(4096, 12288, 32, 16, 4, _QWEN3_5, linear_num_value_heads=32, tie_word_embeddings=False),
    "qwen3.5-35b-a3b": _shape(
        *(2048, 512, 40, 16, 2, _QWEN3_5_MOE),
        moe_intermediate_size=512, shared_expert_intermediate_size=512, linear_num_value_heads=32,
        tie_word_embeddings=False,
    ),
    "llama-3.2-1b": _shape(2048, 8192, 16, 32, 8, _LLAMA, head_dim=64, tie_word_embeddings=True),
    "llama-3.2-3b": _shape(3072, 8192, 28, 24, 8, _LLAMA, head_dim=128, tie_word_embeddings=True),
    "llama-3.1-8b": _shape(4096, 14336, 32, 32, 8, _LLAMA, tie_word_embeddings=False),
    "meta-llama-3-8b": _shape(4096, 14336, 32, 32, 8, _LLAMA, max_position_embeddings=8192),
    "gemma-2-2b": _shape(2304, 9216, 26, 8, 4, _GEMMA2, head_dim=256),
    "gemma-2-9b": _shape(3584, 14336, 42, 16, 8, _GEMMA2, head_dim=256),
    "gemma-3-1b": _shape(1152, 6912, 26, 4, 1, _GEMMA3, head_dim=256, sliding_window=512),
    "gemma-3-4b": _shape(2560, 10240, 34, 8, 4, _GEMMA3, vocab_size=262208, head_dim=256, sliding_window=1024),
    "gemma-4-e2b": _shape(
        *(1536, 6144, 35, 8, 1, _GEMMA4),
        layer_types=(["sliding_attention"] * 4 + ["full_attention"]) * 7, num_kv_shared_layers=20,
        use_double_wide_mlp=True,
    ),
    "gemma-4-e4b": _shape(2560, 10240, 42, 8, 2, _GEMMA4, num_kv_shared_layers=18),
}  # fmt: skip
_ENDINGS = ("-instruct", "-it", "-pt", "-base", "-2507")


@dataclass(frozen=True)
class Shape:
    """A base model without its weights.

    config: of its language model.
    source: where the configuration comes from.
    n_weights, n_others: of all that is loaded, and those of it outside the language model, such as a vision tower.
    n_first, period: layers before a pattern of kinds of layers begins, and after how many it repeats.
    download: bytes of its files on the hub; 0 of a folder.
    bits: of a weight of a linear layer in its files, where bitsandbytes wrote them.
    """

    config: PretrainedConfig
    source: str
    n_weights: int
    n_others: int = 0
    n_first: int = 0
    period: int = 1
    download: float = 0.0
    bits: int = 16


@cache
def find_shape(path: str, flag: str, cache_dir: str | None = None, trust_remote_code: bool = False) -> Shape:
    """The shape of a model (not an adapter).

    The table stands in for the hub, never for a folder. Raises UserError where neither has it.
    """
    hub_options = {"cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
    is_folder = Path(path).is_dir()
    try:
        shipped, source = load_config(path, flag=flag, **hub_options), "its config.json"
        headers = read_headers(path)
    except UserError as error:
        if is_folder or path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise
        if (values := SHAPES.get(_table_name(path))) is None:
            known = ", ".join(SHAPES)
            raise UserError(f"{error}; without it the built-in shapes are {known}") from error
        values = dict(values)
        shipped, source = AutoConfig.for_model(values.pop("model_type"), **values), "the built-in table of shapes"
        shipped.dtype, headers = "bfloat16", None
    config = shipped.get_text_config()
    if config.dtype is None and headers is not None and headers.dtype:
        config.dtype = headers.dtype
    n_others, quantization = 0, getattr(shipped, "quantization_config", None)
    if loaded_config(shipped) is shipped is not config:
        with torch.device("meta"):
            wrapper = language_model_class(shipped).from_config(shipped)
        n_others = _count(wrapper) - _count(_skeleton(config))
    shape = shape_of(config, source, n_others)
    download = 0.0 if is_folder else headers.n_bytes if headers else 2.0 * shape.n_weights
    return replace(shape, download=download, bits=_bits_of(quantization))


def shape_of(config: PretrainedConfig, source: str = "", n_others: int = 0) -> Shape:
    """The shape of a language model by its configuration."""
    skeleton = _skeleton(config)
    n_first, period = _pattern(_kinds_of_layers(skeleton, config))
    # Layers that reuse caches are the last ones at any depth, and the caches must be there.
    n_first = max(n_first, _count_sharing(config))
    return Shape(config, source, _count(skeleton) + n_others, n_others, n_first, period)


def _skeleton(config: PretrainedConfig) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _count(model: nn.Module) -> int:
    return sum(weights.numel() for weights in model.parameters())


def _bits_of(quantization: object) -> int:
    values = quantization if isinstance(quantization, dict) else vars(quantization) if quantization else {}
    if values.get("load_in_4bit") or values.get("_load_in_4bit"):
        return 4
    return 8 if values.get("load_in_8bit") or values.get("_load_in_8bit") else 16


# ---------------------------------------------------------------- layers


def _kinds_of_layers(skeleton: nn.Module, config: PretrainedConfig) -> list[tuple]:
    """Of each layer its name of a kind, whether it reuses the cache of another one, and the shapes of its weights."""
    n = config.num_hidden_layers
    layers = next(
        each for each in skeleton.get_decoder().children() if isinstance(each, nn.ModuleList) and len(each) == n
    )
    names = getattr(config, "layer_types", None) or [""] * n
    n_own = n - _count_sharing(config)
    return [
        (names[index], index >= n_own, *((name, weights.shape) for name, weights in layer.named_parameters()))
        for index, layer in enumerate(layers)
    ]


def _count_sharing(config: PretrainedConfig) -> int:
    """Layers that reuse another one's keys and values."""
    return getattr(config, "num_kv_shared_layers", 0) or 0


def _pattern(kinds: list[tuple]) -> tuple[int, int]:
    """How many layers come before a pattern, and its length, with the fewest layers of both."""
    n = len(kinds)
    return min(
        (
            (next((i + 1 for i in range(n - period - 1, -1, -1) if kinds[i] != kinds[i + period]), 0), period)
            for period in range(1, n + 1)
        ),
        key=lambda first_and_period: (sum(first_and_period), first_and_period[1]),
    )


def shallow(config: PretrainedConfig, n_layers: int) -> PretrainedConfig:
    """The configuration with so many layers."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = n_layers
    kinds = config.attribute_map.get("layer_types", "layer_types")
    is_derived = isinstance(getattr(type(config), kinds, None), property)  # from the number of layers
    if not is_derived and getattr(config, kinds, None):
        setattr(config, kinds, getattr(config, kinds)[:n_layers])
    return config


def _table_name(path: str) -> str:
    name = path.rstrip("/").rpartition("/")[2].lower()
    while ending := next((ending for ending in _ENDINGS if name.endswith(ending)), ""):
        name = name.removesuffix(ending)
    return name
