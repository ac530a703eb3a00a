"""The configuration of a model before it is downloaded: from its folder, the hub, or a table of known shapes."""

import copy
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from medtune.errors import UserError
from medtune.models.loading import load_config

_QWEN2 = {"model_type": "qwen2", "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 32768}
_QWEN2_LARGE = _QWEN2 | {"vocab_size": 152064, "tie_word_embeddings": False}
_QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, "max_position_embeddings": 40960}
_LLAMA = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072}
_GEMMA2 = {"model_type": "gemma2", "vocab_size": 256000}
_GEMMA3 = {"model_type": "gemma3_text", "vocab_size": 262144, "max_position_embeddings": 32768}


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
    "llama-3.2-1b": _shape(2048, 8192, 16, 32, 8, _LLAMA, head_dim=64, tie_word_embeddings=True),
    "llama-3.2-3b": _shape(3072, 8192, 28, 24, 8, _LLAMA, head_dim=128, tie_word_embeddings=True),
    "llama-3.1-8b": _shape(4096, 14336, 32, 32, 8, _LLAMA, tie_word_embeddings=False),
    "meta-llama-3-8b": _shape(4096, 14336, 32, 32, 8, _LLAMA, max_position_embeddings=8192),
    "gemma-2-2b": _shape(2304, 9216, 26, 8, 4, _GEMMA2, head_dim=256),
    "gemma-2-9b": _shape(3584, 14336, 42, 16, 8, _GEMMA2, head_dim=256),
    "gemma-3-1b": _shape(1152, 6912, 26, 4, 1, _GEMMA3, head_dim=256, sliding_window=512),
}
_ENDINGS = ("-instruct", "-it", "-pt", "-base", "-2507")


def model_config(path: str, flag: str, **hub_options) -> tuple[PretrainedConfig, str]:
    """The configuration of a model (not an adapter), and where it comes from.

    The table stands in for the hub, never for a folder. Raises UserError where neither has it.
    """
    try:
        config, source = load_config(path, flag=flag, **hub_options), "its config.json"
    except UserError as error:
        if Path(path).is_dir() or path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise
        if (values := SHAPES.get(_table_name(path))) is None:
            known = ", ".join(SHAPES)
            raise UserError(f"{error}; without it the built-in shapes are {known}") from error
        values = dict(values)
        config, source = AutoConfig.for_model(values.pop("model_type"), **values), "the built-in table of shapes"
        config.dtype = "bfloat16"
    return config.get_text_config(), source


def count_weights(config: PretrainedConfig) -> int:
    """Of all layers, the embedding and a head that is not tied to it."""
    counts = []
    for n_layers in (1, 2):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shallow(config, n_layers))
        counts.append(sum(weights.numel() for weights in model.parameters()))
    return counts[0] + (counts[1] - counts[0]) * (config.num_hidden_layers - 1)


def shallow(config: PretrainedConfig, n_layers: int) -> PretrainedConfig:
    """The configuration with so many layers."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = n_layers
    kinds = config.attribute_map.get("layer_types", "layer_types")
    is_derived = isinstance(getattr(type(config), kinds, None), property)  # from the number of layers
    if not is_derived and getattr(config, kinds, None):
        setattr(config, kinds, getattr(config, kinds)[:n_layers])
    return config


def pattern_length(config: PretrainedConfig) -> int:
    """After how many layers their kinds repeat."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    return next(
        length
        for length in range(1, len(kinds) + 1)
        if all(kind == kinds[index % length] for index, kind in enumerate(kinds))
    )


def _table_name(path: str) -> str:
    name = path.rstrip("/").rpartition("/")[2].lower()
    while ending := next((ending for ending in _ENDINGS if name.endswith(ending)), ""):
        name = name.removesuffix(ending)
    return name
