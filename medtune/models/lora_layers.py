"""On which layers of a model LoRA is, or could be."""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from medtune.models.text_part import text_backbone

# The last layer under the names that models give it; a reward model's is always called score here.
HEADS = ("lm_head", "embed_out", "score", "classifier")
# Whose weights Mamba takes past the layer, so that an adapter there does nothing; PEFT refuses one on the first.
MAMBA_OUTPUT, MAMBA_TIME_STEP = "out_proj", "dt_proj"


class LoraTargets(NamedTuple):
    """What an adapter on all linear layers is on, in PEFT's terms."""

    modules: list[str]  # last names of linear layers
    parameters: list[str]  # ends of the paths of other weights


def all_linear_layers(base: PreTrainedModel) -> LoraTargets:
    """The language model's linear layers and its experts: not the head, nor routers, nor parts beside it.

    Experts are fused into 3D parameters. Layers that PEFT 0.21 takes for experts by their names, and would leave out,
    are adapted by their weights too.
    """
    beside, chosen_by = beside_language_model(base), routers(base)
    linear: dict[str, list[str]] = {}
    parameters = []
    for path, tensor, _ in linear_matrices(base):
        module, weights = base.get_submodule(path), base.get_parameter(f"{path}.{tensor}")
        if (beside and re.match(beside, path)) or is_within(path, chosen_by):
            continue
        if isinstance(module, torch.nn.Linear | Conv1D):
            linear.setdefault(path.rpartition(".")[2], []).append(path)
        elif weights.is_floating_point() and len(getattr(weights, "ds_shape", weights.shape)) == 3:
            parameters.append(f"{path}.{tensor}")
    modules = linear.keys() - {MAMBA_TIME_STEP} - ({MAMBA_OUTPUT} if _is_mamba(base) else set())
    swallowed = modules - _kept_by_peft(base, modules)
    paths = [path for name in swallowed for path in linear[name]]
    parameters += [f"{path}.weight" for path in paths if base.get_parameter(f"{path}.weight").is_floating_point()]
    # Without the number of the layer, where no other part can have the same name.
    ends = parameters if beside else [re.sub(r"^.*\.\d+\.", "", path) for path in parameters]
    return LoraTargets(sorted(modules - swallowed), sorted(set(ends)))


def linear_weights(base: PreTrainedModel, names: Collection[str]) -> list[str]:
    """Of layers with these last names those weights that PEFT 0.21 would leave out, as for `all_linear_layers`."""
    layers = all_linear_layers(base)
    return [path for path in layers.parameters if path.endswith(tuple(f".{name}.weight" for name in names))]


def _kept_by_peft(base: PreTrainedModel, names: Collection[str]) -> set[str]:
    config = LoraConfig(target_modules=list(names))
    convert_peft_config_for_transformers(config, base, None)
    return set(config.target_modules)


def _is_mamba(base: PreTrainedModel) -> bool:
    """Whether PEFT 0.21 refuses adapters on MAMBA_OUTPUT in this model."""
    try:
        _check_lora_target_modules_mamba(LoraConfig(), base, MAMBA_OUTPUT)
    except ValueError:
        return True
    return False


def routers(model: torch.nn.Module) -> list[str]:
    """The paths of the modules that choose the experts of a token."""
    paths = []
    for path, module in model.named_modules():
        children = {name for name, _ in module.named_children()}
        names = children & ({"router", "gate"} if "experts" in children else {"router"})
        paths += [f"{path}.{name}" for name in names]
    return paths


def is_within(path: str, modules: Collection[str]) -> bool:
    """Whether a path is one of these modules, or in it."""
    return any(path == module or path.startswith(f"{module}.") for module in modules)


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
            kinds[part[1].rpartition(".")[2] if part else ".".join(names[-2:])] += 1
    return kinds, sizes[False] / max(sum(sizes.values()), 1)


def parts_beside_language_model(base: PreTrainedModel) -> list[str]:
    """The paths of a multimodal model's other parts, such as `model.vision_tower`; none of a language model."""
    decoder = next((path for path, module in base.named_modules() if module is text_backbone(base)), "")
    parent, _, name = decoder.rpartition(".")
    return [f"{parent}.{part}" for part, _ in base.get_submodule(parent).named_children() if parent and part != name]


def beside_language_model(base: PreTrainedModel) -> str | None:
    """A regular expression for the modules beside a multimodal model's language model; its group is the part.

    None if the model has no other parts.
    """
    parts = parts_beside_language_model(base)
    return rf"({'|'.join(map(re.escape, parts))})(?:\..*)?" if parts else None


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
