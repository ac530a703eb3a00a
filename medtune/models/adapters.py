"""LoRA adapters: create or continue one for training, and load trained ones on their base."""

import copy
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from loguru import logger
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from medtune.arguments import LoraArguments
from medtune.errors import UserError
from medtune.models.families import check_same_family
from medtune.models.lineage import base_of, is_adapter, read_adapter_config
from medtune.models.loading import load_base_model, load_config
from medtune.models.lora_layers import (
    HEADS,
    all_linear_layers,
    beside_language_model,
    linear_module_names,
    linear_weights,
    lora_layers,
    parts_beside_language_model,
)
from medtune.models.model_files import ADAPTER_WEIGHTS
from medtune.models.score_heads import is_head, load_scoring_base
from medtune.models.text_part import language_model_class, loaded_config
from medtune.models.vocabulary import has_tied_head

DEFAULT_LORA_RANK = 16
DEFAULT_LORA_ALPHA = 32.0
ALL_LINEAR = ("all", "all-linear")

_LEAVE_OR_MERGE = (
    "leave the flag out, or merge the adapter (merge_peft_adapter.py) and start a new one on the merged model"
)


def refuse_quantized_training(use_peft: bool, quantized: bool | None) -> None:
    """Raise UserError where the weights to train are of 4 or 8 bits."""
    if quantized and not use_peft:
        raise UserError("--use_peft False with a quantized base: its weights cannot be trained; use --use_peft True")


def load_for_training(
    path: str,
    lora: LoraArguments,
    *,
    task_type: TaskType = TaskType.CAUSAL_LM,
    checkpoint: str | None = None,
    **base_options,
) -> PreTrainedModel | PeftModel:
    """The model to train: a base with a new adapter, a base with its adapter continued, or all weights.

    None for rank, alpha or modules means the adapter's own, or for a new adapter 16, 32 and every linear layer.
    With SEQ_CLS it is a reward model, and `pad_token_id` is needed. A language model or its adapter is then the
    start: its LoRA matrices go over as they are, and a score head of zeros is trained and saved with them.

    Args:
        checkpoint: of the run that is resumed, whose adapter keeps its modules, whatever "all" means by now.

    Raises:
        UserError: the adapter at `path` has another shape than the flags ask for, or is asked to be trained as a
            full model. What an earlier stage learned is never dropped.
    """
    load_base = load_scoring_base if task_type is TaskType.SEQ_CLS else load_base_model
    base_path, recorded = base_of(path), path if is_adapter(path) else checkpoint
    config, has_other_head = None, False
    if recorded and is_adapter(recorded):
        config = read_adapter_config(recorded)
        has_other_head = task_type is TaskType.SEQ_CLS and config.task_type != TaskType.SEQ_CLS
        if task_type is TaskType.SEQ_CLS:
            config = without_head(config)
        _check_continuable(recorded, config, lora, task_type)
    refuse_quantized_training(lora.use_peft, base_options.get("load_in_4bit") or base_options.get("load_in_8bit"))
    base = load_base(base_path, **base_options)
    _log_other_parts(base, base_path, **base_options)
    if not lora.use_peft:
        return _with_trained_language_model(base)
    linear = all_linear_layers(base).modules
    with _explain_peft_faults(base, path, lora.target_modules):
        if config is None:
            config = new_lora_config(base, lora, task_type)
        else:
            config.task_type = task_type.value if has_other_head else config.task_type
            config.lora_dropout = _possible_dropout(config, lora.lora_dropout)
            config.inference_mode = False
        if not is_adapter(path):
            return get_peft_model(base, config)
        model = put_adapter_on(
            base, path, "--model_name_or_path", has_other_head=has_other_head, config=config, is_trainable=True
        )
    # Those that any adapter on all has had; which experts it has is its own affair.
    bare = set(linear) - lora_layers(model).keys() if lora.target_modules in ALL_LINEAR else set()
    if bare:
        raise UserError(
            f"--target_modules {lora.target_modules}: the adapter in {path} leaves out {', '.join(sorted(bare))}, and "
            f"training continues it; {_LEAVE_OR_MERGE}"
        )
    return model


def _with_trained_language_model(base: PreTrainedModel) -> PreTrainedModel:
    """The base for training all weights but those of parts beside its language model, which text does not pass."""
    if beside := beside_language_model(base):
        for name, weights in base.named_parameters():
            weights.requires_grad_(not re.match(beside, name))
    if base.dtype != torch.float32:
        logger.warning(
            f"all weights are trained in {str(base.dtype).removeprefix('torch.')}, which rounds small updates "
            "away; --torch_dtype float32 keeps them and takes twice the memory for weights, gradients and optimizer"
        )
    return base


def new_lora_config(base: PreTrainedModel, lora: LoraArguments, task_type: TaskType = TaskType.CAUSAL_LM) -> LoraConfig:
    """The configuration of a new adapter on this base, from the flags."""
    trained_whole = _split_names(lora.modules_to_save)
    is_on_all = lora.target_modules in (None, *ALL_LINEAR)
    if is_on_all:
        modules, parameters = all_linear_layers(base)
    else:
        modules = _split_names(lora.target_modules)
        parameters = linear_weights(base, modules)
    config = LoraConfig(
        task_type=task_type,
        r=lora.lora_rank or DEFAULT_LORA_RANK,
        lora_alpha=lora.lora_alpha or DEFAULT_LORA_ALPHA,
        target_modules=modules,
        target_parameters=parameters or None,
        exclude_modules=beside_language_model(base) if is_on_all else None,
        modules_to_save=trained_whole,
        # Otherwise PEFT 0.21 trains a copy of the embeddings, and the head that shared them stays as it was.
        ensure_weight_tying=has_tied_head(base) and bool(set(trained_whole or []) & set(EMBEDDING_LAYER_NAMES)),
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
    )
    convert_peft_config_for_transformers(config, base, None)  # experts by the names of older versions
    config.lora_dropout = _possible_dropout(config, lora.lora_dropout)
    return config


def _possible_dropout(config: LoraConfig, lora_dropout: float) -> float:
    """The dropout, or 0 where the adapter is on weights and not on layers: PEFT 0.21 adds its matrices to them."""
    if config.target_parameters and lora_dropout:
        logger.info(
            f"--lora_dropout {lora_dropout:g}: 0 is used, since an adapter on experts' weights can have no dropout"
        )
        return 0.0
    return lora_dropout


def save_zero_adapter(folder: Path, path: str, lora: LoraArguments, **hub_options) -> None:
    """Save an adapter of zeros as a new one on the base at `path` would be, without loading the base's weights."""
    with torch.device("meta"):
        shipped = load_config(path, **hub_options)
        base = language_model_class(shipped).from_config(
            loaded_config(shipped), trust_remote_code=hub_options.get("trust_remote_code", False)
        )
        with _explain_peft_faults(base, path, lora.target_modules):
            config = new_lora_config(base, lora)
            model = get_peft_model(base, config)
    shapes = {name: tensor.shape for name, tensor in get_peft_model_state_dict(model).items()}
    config.base_model_name_or_path = path
    config.save_pretrained(str(folder))
    zeros = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(zeros, Path(folder, ADAPTER_WEIGHTS), metadata={"format": "pt"})


@contextmanager
def _explain_peft_faults(base: PreTrainedModel, path: str, target_modules: str | None) -> Iterator[None]:
    """Turn what PEFT 0.21 refuses in an adapter on this base into one line that says what to do."""
    flag, linear = f"--target_modules {target_modules or 'all'}", linear_module_names(base)
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        if "not found in the base model" in str(error):
            reason = f"{flag}: no such module in {path}; it has {', '.join(sorted(linear))}, or say all"
        elif "ParamWrapper does not work with" in str(error):
            reason = f"--use_dora True: an adapter on the experts of {path} cannot have that; give --use_dora False"
        elif fused := re.search(r"target\(s\) (.+) without also targeting (.+) because", str(error)):
            reason = f"{flag}: in {path} {fused[1]} and {fused[2]} are one layer; name both, or neither"
        elif refused := re.search(r"Module '(\w+)' is incompatible with Mamba", str(error)):
            possible = ",".join(sorted(linear - {refused[1]}))
            reason = f"{flag}: no adapter can be on {refused[1]} of {path}; give --target_modules {possible}"
        else:
            raise
        raise UserError(reason) from error


def _log_other_parts(
    base: PreTrainedModel, path: str, *, cache_dir: str | None = None, trust_remote_code: bool = False, **_
) -> None:
    """Log the parts of a multimodal model that are never trained."""
    config = load_config(path, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
    if loaded_config(config) is not config:
        parts = [name.removesuffix("_config") for name in config.sub_configs if getattr(config, name) is not None]
        others = ", ".join(name for name in parts if name != "text")
        logger.info(f"{path}: its language model alone is loaded and trained; {others} comes back in a merged model")
    elif parts := parts_beside_language_model(base):
        logger.info(f"{path}: its language model is trained; {', '.join(parts)} stay as they are")


def _check_continuable(path: str, config: LoraConfig, lora: LoraArguments, task_type: TaskType) -> None:
    """Refuse flags that a continued adapter cannot honour."""
    if not lora.use_peft:
        raise UserError(
            f"{path} is a LoRA adapter and --use_peft False trains full weights: merge it first with "
            "merge_peft_adapter.py, then train the merged model"
        )
    # A reward model may start from a language model; the other way round its head would be lost.
    if config.task_type not in (task_type, TaskType.CAUSAL_LM, None):
        raise UserError(f"{path} is a {config.task_type} adapter; this stage continues a {task_type.value} adapter")
    modules = None if lora.target_modules in ALL_LINEAR else _split_names(lora.target_modules)
    requested_and_actual = {
        "--lora_rank": (lora.lora_rank, config.r),
        "--lora_alpha": (lora.lora_alpha, config.lora_alpha),
        "--target_modules": (modules, _target_names(config)),
        "--use_dora": (lora.use_dora or None, config.use_dora),
        "--use_rslora": (lora.use_rslora or None, config.use_rslora),
        "--modules_to_save": (_split_names(lora.modules_to_save), _last_names(config.modules_to_save or [])),
    }
    for flag, (requested, actual) in requested_and_actual.items():  # None requests nothing
        if requested is not None and _format_value(requested) != _format_value(actual):
            raise UserError(
                f"{flag} {_format_value(requested)}: the adapter in {path} has {_format_value(actual)}, and "
                f"training continues it; {_LEAVE_OR_MERGE}"
            )


def without_head(config: LoraConfig) -> LoraConfig:
    """The configuration without a head among its modules, since PEFT adds a reward model's head itself."""
    if isinstance(config.target_modules, set | list):
        config.target_modules = {name for name in config.target_modules if name not in HEADS}
    config.modules_to_save = [name for name in config.modules_to_save or [] if name not in HEADS] or None
    config.ensure_weight_tying = False
    return config


def _format_value(value: object) -> str:
    """A value as it is written after its flag: modules sorted, numbers without `.0`."""
    if isinstance(value, list | set):
        return ",".join(sorted(value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _split_names(names: str | None) -> list[str] | None:
    return [name.strip() for name in names.split(",") if name.strip()] if names else None


def _last_names(names: Iterable[str]) -> set[str]:
    """The last parts of module names, which PEFT may store in full for "all-linear"."""
    return {name.rpartition(".")[2] for name in names}


def _target_names(config: LoraConfig) -> set[str] | str:
    """What --target_modules says for an adapter's layers, those among them whose weights it is on; a pattern stays."""
    if isinstance(config.target_modules, str):
        return config.target_modules
    weights = _last_names(name.removesuffix(".weight") for name in config.target_parameters or ())
    fused = {"gate_proj", "up_proj"} if "gate_up_proj" in weights else set()
    return _last_names(config.target_modules) | weights - {"gate_up_proj"} | fused


def put_adapter_on(
    base: PreTrainedModel | PeftModel,
    path: str,
    flag: str,
    has_other_head: bool = False,
    adapter_name: str = "default",
    **options,
) -> PeftModel:
    """Load an adapter on a base, which may have others, and refuse it unless every tensor fits.

    PEFT 0.21 only warns of tensors that the file lacks, drops those that the model lacks, and takes nan.

    Args:
        has_other_head: the base has another head than the adapter was trained with; heads are not compared.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            # PEFT 0.21 asks transformers 5.24 by the old name.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            if has_other_head:
                model = _matrices_on(base, path, options["config"])
            elif isinstance(base, PeftModel):
                base.load_adapter(path, adapter_name)
                model = base
            else:
                model = PeftModel.from_pretrained(base, path, adapter_name, **options)
    except (RuntimeError, ValueError) as error:
        if "size mismatch" not in str(error) and "not found in the base model" not in str(error):
            raise
        raise UserError(
            f"{flag} {path}: the adapter does not fit {base.name_or_path}: other layers or sizes"
        ) from error
    weights = check_adapter_tensors(model, path, flag, adapter_name, has_other_head)
    broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(
            f"{flag} {path}: {len(broken)} tensors hold nan or inf, such as {broken[0]}; take an earlier one"
        )
    return model


def check_adapter_tensors(
    model: PeftModel, path: str, flag: str, adapter_name: str = "default", has_other_head: bool = False
) -> dict[str, torch.Tensor]:
    """The adapter's weights in the model; raises UserError unless the adapter in `path` has tensors of the same names.

    Args:
        has_other_head: of the model than of the adapter; heads are not compared.
    """
    with safe_open(Path(path, ADAPTER_WEIGHTS), framework="pt") as file:
        in_file = set(file.keys())
    weights = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    of_base = model.state_dict().keys() - weights.keys()  # an embedding that PEFT saved with the adapter
    odd = sorted(weights.keys() ^ (in_file - of_base))
    if has_other_head:
        odd = [name for name in odd if not is_head(name)]
    if odd:
        raise UserError(
            f"{flag} {path}: {len(odd)} tensors are in {ADAPTER_WEIGHTS} and not in "
            f"{model.get_base_model().name_or_path} with this adapter, or the other way round, such as {odd[0]}; take "
            "another checkpoint, or the base it was trained on"
        )
    return weights


def _matrices_on(base: PreTrainedModel, path: str, config: LoraConfig) -> PeftModel:
    """A new adapter with the LoRA matrices of the one in `path`, whose head differs from the base's."""
    model = get_peft_model(base, config)
    heads = {name: weights for name, weights in get_peft_model_state_dict(model).items() if is_head(name)}
    weights = load_file(Path(path, ADAPTER_WEIGHTS))
    if left_out := [name for name in weights if is_head(name)]:
        logger.info(f"{path}: {', '.join(left_out)} left out: the head of a reward model stands in its place")
    set_peft_model_state_dict(model, {name: weights[name] for name in weights if not is_head(name)} | heads)
    return model


def add_adapter(model: PeftModel, name: str, config: LoraConfig, weights: dict[str, torch.Tensor], where: str) -> None:
    """Put one more LoRA adapter on a model, frozen until `set_adapter` takes it to train.

    Raises UserError, which begins with `where`, if the weights do not fit the model.
    """
    model.add_adapter(name, copy.deepcopy(config))
    expected = get_peft_model_state_dict(model, adapter_name=name)
    odd = sorted(expected.keys() ^ weights.keys())
    odd += [key for key in expected.keys() & weights.keys() if expected[key].shape != weights[key].shape]
    if odd:
        raise UserError(
            f"{where}: {len(odd)} tensors do not fit {model.get_base_model().name_or_path}, such as {odd[0]}"
        )
    set_peft_model_state_dict(model, weights, adapter_name=name)
    for key, parameter in model.named_parameters():
        if name in key.split(".")[-2:]:  # matrices are modules, those of embeddings parameters
            parameter.requires_grad_(False)


def load_with_adapter(base_model: str, lora_model: str, **base_options) -> PeftModel:
    """A base with an adapter, for use (not for training), after a check that they belong together."""
    return load_with_adapters(base_model, {"default": lora_model}, **base_options)


def load_with_adapters(base_model: str, adapters: dict[str, str], **base_options) -> PeftModel:
    """One base with several adapters, switched by `set_adapter`, after a check that they belong together.

    Args:
        adapters: the folder of each, by the name it is switched on with.
    """
    for lora_model in adapters.values():
        check_same_family(
            base_model,
            lora_model,
            cache_dir=base_options.get("cache_dir"),
            trust_remote_code=base_options.get("trust_remote_code", False),
        )
    model = load_base_model(base_model, flag="--base_model", **base_options)
    for name, lora_model in adapters.items():
        model = put_adapter_on(model, lora_model, "--lora_model", adapter_name=name)
    return model
