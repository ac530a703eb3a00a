"""The dropout of a model: its modules, and layers that call the function with a probability of their own."""

import torch

FUNCTIONAL = ("attention_dropout", "activation_dropout", "dropout")


def switch_off_dropout(model: torch.nn.Module) -> None:
    """Switch off the dropout of layers, adapters and attention."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in FUNCTIONAL:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def has_dropout(model: torch.nn.Module) -> bool:
    """Whether training draws random numbers for dropout."""
    return any(
        (isinstance(module, torch.nn.Dropout) and module.p > 0)
        or any(isinstance(getattr(module, name, None), float) and getattr(module, name) > 0 for name in FUNCTIONAL)
        for module in model.modules()
    )
