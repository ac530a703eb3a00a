"""Whether each GPU computes what it should: in bfloat16, in 4 bits, by FlashAttention."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from medtune.machine.findings import FINE, NOTE, WRONG, Finding
from medtune.torch_builds import dotted

if TYPE_CHECKING:
    from torch import Tensor

# The largest relative error; 4 bits have 0.09, a GPU that computes nonsense about 1.
LARGEST_ERROR = 0.15


def check_computing(devices: Sequence[str]) -> Iterator[Finding]:
    """Of torch's devices, such as cuda:0."""
    checks: dict[str, Callable[[str], float]] = {"bfloat16": bfloat16_error, "bitsandbytes": four_bit_error}
    if importlib.util.find_spec("flash_attn"):
        checks["FlashAttention"] = flash_attention_error
    else:
        yield Finding(FINE, "FlashAttention", "not installed, so SDPA is used; requirements/gpu.txt says how to add it")
    for subject, error_on in checks.items():
        right = []
        for device in devices:
            if subject != "bitsandbytes" and (lacking := _lacks_bfloat16(device)):
                yield Finding(NOTE, subject, f"{lacking}: --fp16 True --bf16 False, and no --flash_attn")
            elif fault := _fault(device, error_on):
                todo = f"leave {device} out of CUDA_VISIBLE_DEVICES, or rent another machine"
                yield Finding(WRONG, subject, f"{device} {fault}: {todo}")
            else:
                right.append(device)
        if right:
            yield Finding(FINE, subject, f"right on {', '.join(right)}")


def _lacks_bfloat16(device: str) -> str:
    """What is said where a GPU has no bfloat16; "" if it does."""
    import torch

    if device == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0):
        return ""
    return f"{device} has none (compute capability {dotted(torch.cuda.get_device_capability(device))})"


def _fault(device: str, error_on: Callable[[str], float]) -> str:
    """What is wrong there; "" if nothing is."""
    try:
        error = error_on(device)
    except (RuntimeError, ImportError, OSError) as raised:
        return f"fails ({' '.join(str(raised).split())[:200]})"
    return "" if error < LARGEST_ERROR else f"computes nonsense (relative error {error:.2g})"


def _relative_error(computed: "Tensor", exact: "Tensor") -> float:
    """||computed - exact|| / ||exact||, of tensors of any shape; infinite where a value is not finite."""
    import torch

    return torch.nan_to_num((computed.float().cpu() - exact).norm() / exact.norm(), torch.inf, torch.inf).item()


def _numbers(*shape: int) -> "Tensor":
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def bfloat16_error(device: str) -> float:
    import torch

    left, right = _numbers(2, 512, 512)
    return _relative_error(left.to(device, torch.bfloat16) @ right.to(device, torch.bfloat16), left @ right)


def four_bit_error(device: str) -> float:
    """Of weights in NF4, as QLoRA holds them."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weights = _numbers(512, 512)
    return _relative_error(dequantize_4bit(*quantize_4bit(weights.to(device), quant_type="nf4")), weights)


def flash_attention_error(device: str) -> float:
    """Against SDPA on the CPU, causal, 4 heads of 64."""
    import torch

    flash_attn = importlib.import_module("flash_attn")  # which requirements/gpu.txt leaves to the user
    tensors = _numbers(3, 1, 128, 4, 64)  # query, key, value: batch, positions, heads, dimensions
    exact = torch.nn.functional.scaled_dot_product_attention(*tensors.transpose(2, 3), is_causal=True).transpose(1, 2)
    return _relative_error(flash_attn.flash_attn_func(*tensors.to(device, torch.bfloat16), causal=True), exact)
