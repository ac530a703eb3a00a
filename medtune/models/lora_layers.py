"""On which layers of a model LoRA is, or could be."""

import copy
import math
import re
from collections import Counter
from collections.abc import Iterator

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel

# The last layer under the names that models give it; a reward model's is always called score here.
HEADS = ("lm_head", "embed_out", "score", "classifier")


def bare_layers(model: PeftModel) -> set[str]:
    """The layers without an adapter that an adapter on all linear layers would cover."""
    base = model.get_base_model()
    if not linear_module_names(base) - lora_layers(model).keys():
        return set()
    config = LoraConfig(target_modules="all-linear", exclude_modules=beside_language_model(base))
    with torch.device("meta"):
        skeleton = get_peft_model(type(base)(copy.deepcopy(base.config)), config)
    return lora_layers(skeleton).keys() - lora_layers(model).keys() - set(HEADS)


def lora_layers(model: torch.nn.Module) -> Counter[str]:
    """The number of layers with a LoRA adapter by module name; fused experts by module and tensor."""
    return Counter(
        path.rpartition(".")[2] if parameter == "weight" else f"{path.rpartition('.')[2]}.{parameter}"
        for path, parameter in _adapted_tensors(model)
    )


def _adapted_tensors(model: torch.nn.Module) -> Iterator[tuple[str, str]]:
    """The module and tensor under each LoRA adapter; several adapters on fused experts are nested."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and module.lora_A:
            yield path.replace(".base_layer", ""), getattr(module, "parameter_name", "weight")


def linear_matrices(model: PreTrainedModel) -> Iterator[tuple[str, str, int]]:
    """Module, tensor and number of weights of each matrix of a base, and of each 3D tensor of fused experts.

    Embeddings, convolutions, the head and modules that are trained in full are left out.
    """
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        names = set(path.split("."))
        if module is head or isinstance(module, torch.nn.Embedding | _ConvNd):
            continue
        if names & {*HEADS, "modules_to_save", "original_module"} or any(name.startswith("lora_") for name in names):
            continue
        for tensor, weights in module.named_parameters(recurse=False):
            shape = getattr(weights, "ds_shape", weights.shape)  # ZeRO-3 leaves empty parameters
            is_matrix = len(shape) == 2 and tensor.endswith("weight")
            if is_matrix or (len(shape) == 3 and min(shape) > 1):
                # Quantized weights hold several values an element.
                is_linear = isinstance(module, torch.nn.Linear)
                size = module.in_features * module.out_features if is_linear else math.prod(shape)
                yield path.replace(".base_layer", ""), tensor, size


def _bare_matrices(model: PeftModel) -> tuple[Counter[str], float]:
    """The number of matrices without an adapter by kind, and their share of all matrices' weights.

    A part beside the language model, such as a vision tower, is one kind.
    """
    base = model.get_base_model()
    beside = beside_language_model(base)
    adapted = set(_adapted_tensors(base))
    kinds: Counter[str] = Counter()
    sizes = {True: 0, False: 0}
    for path, tensor, size in linear_matrices(base):
        is_adapted = (path, tensor) in adapted
        sizes[is_adapted] += size
        if not is_adapted:
            part = beside and re.match(beside, path)
            names = [name for name in path.split(".") if not name.isdigit()] + [tensor] * (tensor != "weight")
            kinds[part[1] if part else ".".join(names[-2:])] += 1
    return kinds, sizes[False] / max(sum(sizes.values()), 1)


def beside_language_model(base: PreTrainedModel) -> str | None:
    """A regular expression for the modules beside a multimodal model's language model; its group is the part.

    None if the model has no other parts.
    """
    decoder = next((path for path, module in base.named_modules() if module is base.get_decoder()), "")
    parent, _, name = decoder.rpartition(".")
    parts = [part for part, _ in base.get_submodule(parent).named_children() if parent and part != name]
    return rf"{re.escape(parent)}\.({'|'.join(map(re.escape, parts))})(?:\..*)?" if parts else None


def linear_module_names(model: PreTrainedModel) -> set[str]:
    """The last names of the linear layers that PEFT's "all-linear" takes: all but the head."""
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return linear - set(HEADS)


def describe_trainable(model: PreTrainedModel | PeftModel) -> str:
    """One line: trainable parameters of all; for an adapter the layers with one by module type, and those without."""
    # Quantized weights hold several values an element; PEFT's count knows that.
    if isinstance(model, PeftModel):
        trainable, total = model.get_nb_trainable_parameters()
    else:
        # ZeRO-3 leaves empty parameters and says how large they were.
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
        total = sum(size for size, _ in sizes)
        trainable = sum(size for size, is_trained in sizes if is_trained)
    line = f"{trainable:,} of {total:,} parameters trained ({trainable / total:.2%})"
    if layers := lora_layers(model):
        line += "; LoRA on " + ", ".join(f"{count} {name}" for name, count in layers.items())
        bare, share = _bare_matrices(model)
        if bare:
            line += f"; no adapter on {share:.1%} of the matrices' weights: "
            line += ", ".join(f"{count} {name}" for name, count in bare.items())
    return line
