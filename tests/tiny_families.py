"""Tiny untrained models of other families than the tests' Qwen2, with its tokenizer."""

import shutil
from pathlib import Path

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

SHAPE = {
    "vocab_size": 640,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
HEADS = {"head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16}
GROUPS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
# What each model type needs besides SHAPE.
FAMILIES = {
    "qwen3": HEADS,
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "gemma3_text": HEADS | SLIDING,
    "qwen3_moe": HEADS | EXPERTS,
    "glm4_moe": HEADS | EXPERTS | GROUPS,
    "qwen3_next": HEADS | EXPERTS | LINEAR_ATTENTION | {"shared_expert_intermediate_size": 32},
    "qwen3_5_text": HEADS | LINEAR_ATTENTION,
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    # Weights large enough that a leak is more than rounding.
    "lfm2_moe": {"initializer_range": 0.1}
    | EXPERTS
    | {"layer_types": ["conv", "conv", "full_attention", "conv"], "num_dense_layers": 1, "conv_L_cache": 3},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False},
    "granitemoehybrid": MAMBA
    | {"layer_types": ["mamba", "attention"] * 2, "num_local_experts": 0, "shared_intermediate_size": 64},
    "falcon_h1": HEADS | MAMBA | {"mamba_d_ssm": 128},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16},
    "mistral": HEADS | {"sliding_window": 8},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "afmoe": HEADS | EXPERTS,
    "gpt_oss": HEADS | EXPERTS | {"num_local_experts": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen2": {},
    "llama": {},
    "phi3": {},
    "granite": {"logits_scaling": 4.0},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "glm4": HEADS,
    "internlm3": HEADS,
    "ministral3": HEADS,
    "gemma2": HEADS | {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "cohere2": HEADS | SLIDING | {"logit_scale": 0.25},
    "olmo3": SLIDING,
    "minicpm3": LATENT | {"num_key_value_heads": 4},
    "deepseek_v3": LATENT
    | GROUPS
    | {"num_key_value_heads": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1},
    "gemma4_text": HEADS
    | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
    | {"global_head_dim": 32, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 640},
    "qwen3_5_moe_text": HEADS | EXPERTS | LINEAR_ATTENTION | {"shared_expert_intermediate_size": 32},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mamba", "moe"], "head_dim": 16, "mamba_num_heads": 8}
    | {"mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32},
}

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_multimodal_model(folder: Path, tokenizer_from: Path) -> Path:
    """Gemma 3 with its vision tower."""
    torch.manual_seed(0)
    text, vision = SHAPE | FAMILIES["gemma3_text"], VISION | {"image_size": 32, "patch_size": 8}
    tokens = {"image_token_index": 639, "boi_token_index": 638, "eoi_token_index": 637, "mm_tokens_per_image": 4}
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, **tokens))
    return _save(model, folder, tokenizer_from)


def save_multimodal_model_of_text_class(folder: Path, tokenizer_from: Path) -> Path:
    """Qwen3.5 with its vision tower, which AutoModelForCausalLM leaves out."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
    text = SHAPE | FAMILIES["qwen3_5_text"] | {"rope_parameters": rope}
    vision = VISION | {"depth": 2, "num_heads": 2, "out_hidden_size": 64, "num_position_embeddings": 64}
    model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision))
    return _save(model, folder, tokenizer_from)


def save_mistral3(folder: Path, tokenizer_from: Path) -> Path:
    """Ministral 3 with its vision tower, which AutoModelForCausalLM does not know."""
    torch.manual_seed(0)
    text, vision = SHAPE | HEADS | {"model_type": "ministral3"}, VISION | {"image_size": 32, "patch_size": 8}
    vision |= {"model_type": "pixtral", "head_dim": 16}
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=639, spatial_merge_size=2)
    return _save(Mistral3ForConditionalGeneration(config), folder, tokenizer_from)


def save_gemma4(folder: Path, tokenizer_from: Path) -> Path:
    """Gemma 4 with its vision tower."""
    torch.manual_seed(0)
    tokens = {f"{kind}_token_id": 639 - index for index, kind in enumerate(("image", "video", "audio"))}
    vision = VISION | {"num_key_value_heads": 2, "head_dim": 16, "patch_size": 8, "position_embedding_size": 64}
    text = SHAPE | FAMILIES["gemma4_text"]
    config = Gemma4Config(text_config=text, vision_config=vision, audio_config=None, **tokens)
    return _save(Gemma4ForConditionalGeneration(config), folder, tokenizer_from)


def tiny_model(model_type: str, attention: str | None = None, **changes) -> torch.nn.Module:
    """An untrained model as its class draws it."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**SHAPE | FAMILIES[model_type] | changes)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


# Checkpoints as they are shipped, with a vision tower.
AS_SHIPPED = {
    "gemma3": save_multimodal_model,
    "gemma4": save_gemma4,
    "qwen3_5": save_multimodal_model_of_text_class,
    "mistral3": save_mistral3,
}


def save_family(name: str, folder: Path, tokenizer_from: Path) -> Path:
    """A model type, or a checkpoint as shipped."""
    if name in AS_SHIPPED:
        return AS_SHIPPED[name](folder, tokenizer_from)
    return save_tiny_model(name, folder, tokenizer_from)


def save_tiny_model(model_type: str, folder: Path, tokenizer_from: Path, **changes) -> Path:
    """The model and the tokenizer of another folder, as a stage loads them."""
    return _save(tiny_model(model_type, **changes), folder, tokenizer_from)


def _save(model: torch.nn.Module, folder: Path, tokenizer_from: Path) -> Path:
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tokenizer_from / name).is_file():
            shutil.copy(tokenizer_from / name, folder)
    return folder
