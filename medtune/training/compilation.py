"""torch.compile for training: layer by layer, and once for all lengths.

The whole model would be compiled anew for each length of a batch, which takes longer than a step gains.
"""

import torch
from loguru import logger
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from medtune.models.text_attention import SDPA_BY_TEXT, attention_by_text


def compile_layers(model: torch.nn.Module, backend: str, mode: str | None) -> None:
    """Have each layer compiled in place at its first pass; all share what the first one compiles, for any length.

    Args:
        backend, mode: of torch.compile.
    """
    # Its loop over the texts of a row would be compiled for each number of texts.
    AttentionInterface.register(SDPA_BY_TEXT, torch.compiler.disable(attention_by_text))
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(backend=backend, mode=mode, dynamic=True)
    logger.info("--torch_compile: the first step compiles the layers and takes longer, by up to some minutes")
