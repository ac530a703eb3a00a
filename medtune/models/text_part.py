"""Of a checkpoint as it is shipped, the part that all stages train, score, merge and serve: its language model.

Where a checkpoint is a multimodal wrapper, AutoModelForCausalLM gives either the language model alone (Qwen3.5) or the
whole wrapper (Gemma 3 and 4); Mistral 3 it does not know, whose wrapper is loaded. So adapters fit the class that
anybody else gets from the checkpoint. The other parts of a wrapper (vision tower, projector) are never trained.
"""

import torch
from peft import PeftModel
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the language model: hidden size, vocabulary, pad token; a wrapper's own has none of them."""
    return config.get_text_config(decoder=True)


def inside_peft(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model in PEFT's wrapper, with the layers of its adapters; a model without one is given back."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def text_backbone(model: PreTrainedModel | PeftModel) -> torch.nn.Module:
    """The language model without its head, inside PEFT and a wrapper; its last states go into the head."""
    return inside_peft(model).get_decoder()


def language_model_class(config: PretrainedConfig) -> type:
    """The auto class that loads a checkpoint's language model, with its head and perhaps in its wrapper."""
    is_wrapper_alone = (
        type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
        and "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {})
    )
    return AutoModelForImageTextToText if is_wrapper_alone else AutoModelForCausalLM


def loaded_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of what `language_model_class` gives: the wrapper's, or that of its language model alone.

    A reward model of this configuration has its layers under the same names as the language model.
    """
    own = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    text = text_config(config)
    if own is None or text is config or own.config_class is not type(text):
        return config
    if quantization := getattr(config, "quantization_config", None):
        text.quantization_config = quantization
    return text
