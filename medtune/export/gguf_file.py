"""A GGUF file of Qwen2, Qwen2.5 and Qwen3 models, written and loaded back without llama.cpp.

llama.cpp's own converter refuses a tokenizer whose vocabulary it does not know, as that of the embedded base model.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ARCHITECTURES = {"Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2, "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3}
GGUF_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
# Fields of a config.json that `write_gguf` writes, and those that change nothing a trained model says; rope
# parameters and sliding windows are looked at one by one.
WRITTEN = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters"),
}
WITHOUT_EFFECT = {
    *("transformers_version", "architectures", "dtype", "id2label", "label2id", "problem_type", "_name_or_path"),
    *("output_hidden_states", "output_attentions", "return_dict", "use_cache", "initializer_range"),
    *("attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id"),
    *("use_sliding_window", "sliding_window", "max_window_layers"),  # `layer_types` says where one is used
}
# Names in rope_parameters and in GGUF of what the scalings that llama.cpp knows are made of.
ROPE_SCALING_KEYS = {
    "rope_type": gguf.Keys.Rope.SCALING_TYPE,
    "factor": gguf.Keys.Rope.SCALING_FACTOR,
    "original_max_position_embeddings": gguf.Keys.Rope.SCALING_ORIG_CTX_LEN,
}
# Where others are left out or say this, llama.cpp computes as transformers does.
ROPE_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "partial_rotary_factor": 1.0}


def why_not_written(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> str | None:
    """What llama.cpp would read otherwise in our file than transformers does in the model; None if nothing."""
    architecture = (config.architectures or [""])[0]
    if architecture not in ARCHITECTURES:
        return f"{architecture}; GGUF is written here for {' and '.join(ARCHITECTURES)}"
    split = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]
    # The pattern that llama.cpp knows by the name qwen2.
    known = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    if known not in [part.get("pattern", {}).get("Regex") for part in (split or {}).get("pretokenizers", [])]:
        return "its tokenizer splits text otherwise than Qwen2's"
    if odd := _odd_settings(config):
        named = ", ".join(f"{name} {value!s:.60}" for name, value in sorted(odd.items()))
        return f"{named} in its config.json: the GGUF file written here would leave it out and say something else"
    return None


def _odd_settings(config: PretrainedConfig) -> dict[str, object]:
    """Fields of config.json that change what the model says and have no place in the file."""
    default = type(config)(num_hidden_layers=config.num_hidden_layers).to_dict()
    # Which is written of Qwen3; Qwen2's has no field of that name.
    is_qwen3 = config.model_type == "qwen3"
    default["head_dim"] = config.head_dim if is_qwen3 else config.hidden_size // config.num_attention_heads
    default["quantization_config"] = None
    odd = {
        name: getattr(config, name)
        for name in default.keys() - WRITTEN - WITHOUT_EFFECT
        if getattr(config, name, default[name]) != default[name]
    }
    if odd.pop("layer_types", None) and config.sliding_window < config.max_position_embeddings:
        odd["sliding_window"] = config.sliding_window
    rope = config.rope_parameters
    if rope["rope_type"] not in ("default", "linear", "yarn"):
        odd["rope_type"] = rope["rope_type"]
    elif rope["rope_type"] != "default":
        known = rope.keys() & {*ROPE_SCALING_KEYS, "rope_theta", "type"}
        odd |= {name: rope[name] for name in rope.keys() - known if rope[name] not in (None, ROPE_DEFAULTS.get(name))}
    return odd


def write_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Path, file: Path, gguf_type: str
) -> None:
    """Weights, hyper-parameters and tokenizer in one file, under the names that llama.cpp gives them."""
    config = model.config
    architecture = ARCHITECTURES[type(model).__name__]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_name(source.name)
    writer.add_file_type(GGUF_TYPES[gguf_type])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if config.model_type == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] != "default":
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    texts, types = zip(*vocabulary(tokenizer, config.vocab_size), strict=True)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(source, load_merges=True, n_vocab=config.vocab_size)
    special.chat_template = tokenizer.chat_template
    special.special_token_ids |= {"eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    special.add_to_gguf(writer, quiet=True)
    writer.add_add_bos_token(False)

    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in tensors_of(model):
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new_name is not None, f"{name} has no name in GGUF"
        writer.add_tensor(new_name, *convert_tensor(tensor, gguf_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def vocabulary(tokenizer: PreTrainedTokenizerBase, n_rows: int) -> Iterator[tuple[str, gguf.TokenType]]:
    """Text and kind of each row of the embedding; rows beyond the tokenizer are marked as unused."""
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    for index in range(n_rows):
        if index not in by_id:
            yield f"[PAD{index}]", gguf.TokenType.UNUSED
        elif index in tokenizer.added_tokens_decoder:
            added = tokenizer.added_tokens_decoder[index]
            yield added.content, gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED
        else:
            yield by_id[index], gguf.TokenType.NORMAL


def tensors_of(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor once: a head that shares the embedding's weights is left out, as llama.cpp expects."""
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            yield name, tensor


def convert_tensor(tensor: torch.Tensor, gguf_type: str) -> tuple:
    """The values for GGUF and their type; norms, biases and rows not divisible into blocks stay float32."""
    values = tensor.float().cpu().numpy()
    kind = gguf.GGMLQuantizationType[gguf_type.upper()]
    block_size, _ = gguf.GGML_QUANT_SIZES[kind]
    if tensor.ndim == 1 or tensor.shape[-1] % block_size:
        kind = gguf.GGMLQuantizationType.F32
    return gguf.quants.quantize(values, kind), None, kind


def load_gguf(file: Path) -> PreTrainedModel:
    """Load a GGUF file with its rope scaling and heads, which transformers 5.24 reads for some other families only."""
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    fields = gguf.GGUFReader(file).fields
    for name, key in ROPE_SCALING_KEYS.items():
        if field := fields.get(key.format(arch=config.model_type)):
            config.rope_parameters[name] = field.contents()
    if field := fields.get(gguf.Keys.Attention.KEY_LENGTH.format(arch=config.model_type)):
        config.head_dim = field.contents()
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, config=config, dtype=torch.float32)
