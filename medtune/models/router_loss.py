"""The load-balancing loss of a mixture of experts, which keeps its routers from sending all tokens to a few experts.

Fedus et al. 2021, https://arxiv.org/abs/2101.03961, equations 4 to 6; transformers computes it. The rule of all stages
that learn token by token (pretraining, SFT, preferences): with the coefficient of config.json where routers are
trained, so with all weights or an adapter that names them; without it where they are frozen and have nothing to keep
balanced. A reward model, whose class computes none, PPO and GRPO, which train adapters, go without.
"""

from inspect import signature

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from medtune.models.lora_layers import is_within, routers
from medtune.models.text_part import inside_peft, text_config


def router_loss_weight(model: PreTrainedModel | PeftModel) -> float:
    """The coefficient with which the load-balancing loss is added; 0 where it is not."""
    base = inside_peft(model)
    paths = routers(base)
    trained = any(weights.requires_grad and is_within(name, paths) for name, weights in base.named_parameters())
    if not trained or not _computes_router_loss(base):
        return 0.0
    return float(getattr(text_config(base.config), "router_aux_loss_coef", 0.0))


def describe_router_loss(model: PreTrainedModel | PeftModel) -> str:
    """One line on it, "" for a model without experts."""
    base = inside_peft(model)
    if not routers(base):
        return ""
    if weight := router_loss_weight(model):
        return f"a mixture of experts whose routers are trained, with {weight:g} times their load-balancing loss"
    trained = any(weights.requires_grad and is_within(name, routers(base)) for name, weights in base.named_parameters())
    reason = f"{type(base).__name__} computes none" if trained else "they are not trained"
    return f"a mixture of experts; its routers' load-balancing loss is not added: {reason}"


def _computes_router_loss(base: torch.nn.Module) -> bool:
    return "output_router_logits" in signature(base.forward).parameters
