"""A tokenizer and a base model, from a folder or the hub: precision, quantization, attention, placement."""

import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from loguru import logger
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file, is_flash_attn_2_available, is_flash_attn_3_available

from medtune.errors import UserError
from medtune.models.lineage import is_adapter, tokenizer_source
from medtune.models.load_errors import (
    NO_TOKENIZER,
    check_loaded,
    explain_bad_file,
    explain_load_errors,
    without_load_report,
)
from medtune.models.model_files import ADAPTER_WEIGHTS, WEIGHTS_INDEX, check_model_files, indexed_files
from medtune.models.text_part import language_model_class, loaded_config, text_config


def load_tokenizer(
    path: str,
    named: str | None = None,
    *,
    flag: str = "--model_name_or_path",
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model or adapter, or that of `--tokenizer_name_or_path`, with a pad token."""
    if named:
        path, flag = named, "--tokenizer_name_or_path"
    source = tokenizer_source(path)
    with (
        explain_bad_file(source, flag, "tokenizer.json, tokenizer_config.json or config.json"),
        explain_load_errors(source, flag),
    ):
        tokenizer = AutoTokenizer.from_pretrained(source, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
    if tokenizer.decode(tokenizer.encode("a", add_special_tokens=False)).strip() != "a":
        # transformers 5.24 makes an empty tokenizer from the config.json of a folder that has no other file.
        raise UserError(f"{flag} {path}: {NO_TOKENIZER}")
    if tokenizer.eos_token is None:
        raise UserError(f"{flag} {path}: its tokenizer has no end-of-text token, so no reply would end")
    if tokenizer.pad_token is None:
        # Padding is masked by position, never by id, so the end token stays a token to learn.
        tokenizer.pad_token = tokenizer.eos_token
    # Longer texts are left out or cut, and counted; transformers 5.24 would warn that they end in indexing errors.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def load_config(path: str, *, flag: str = "--model_name_or_path", **hub_options) -> PretrainedConfig:
    """The configuration of a model (not an adapter), without its weights."""
    with explain_bad_file(path, flag, "config.json"), explain_load_errors(path, flag):
        return AutoConfig.from_pretrained(path, **hub_options)


def weights_fingerprint(
    path: str, *, flag: str = "--model_name_or_path", cache_dir: str | None = None, **hub_options
) -> str:
    """A fingerprint of a model's or adapter's weights; copies of a model in float32 and bf16 have the same.

    SHA-256 of an adapter's weights, of a model over the first values of each tensor of its safetensors files; "" for
    quantized weights and pickle files.
    """
    if is_adapter(path):
        with Path(path, ADAPTER_WEIGHTS).open("rb") as weights:
            return hashlib.file_digest(weights, "sha256").hexdigest()
    if hasattr(load_config(path, flag=flag, cache_dir=cache_dir, **hub_options), "quantization_config"):
        return ""
    if not (files := weight_files(path, cache_dir=cache_dir)):
        return ""
    first_values = {}
    for file in files:
        with explain_load_errors(path, flag), safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - it is no mapping
                first_values[key] = tensors.get_slice(key)[:1].flatten()[:64].to(torch.bfloat16)
    whole = hashlib.sha256()
    for key in sorted(first_values.keys() - {"lm_head.weight"}):  # which a copy may hold although it is tied
        whole.update(key.encode() + first_values[key].view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def base_file(path: str, name: str, *, cache_dir: str | None = None, **_) -> Path | None:
    """A file of a model's folder or repository, None where it has none of that name."""
    # Offline, a file that the hub does not have is a connection error.
    lenient = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    file = cached_file(path, name, cache_dir=cache_dir, **lenient)
    return Path(file) if file else None


def weight_files(path: str, **hub_options) -> list[Path]:
    """The safetensors files of a model (not an adapter); none of a model with pickle weights, or not complete."""
    names = {"model.safetensors"}
    if index := base_file(path, WEIGHTS_INDEX, **hub_options):
        names = indexed_files(index)
    files = [base_file(path, name, **hub_options) for name in sorted(names)]
    return files if all(files) else []


def quantization_config(
    load_in_4bit: bool, load_in_8bit: bool, compute_dtype: torch.dtype
) -> BitsAndBytesConfig | None:
    """NF4 with double quantization (QLoRA, Dettmers et al. 2023), LLM.int8(), or None."""
    if load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if load_in_8bit else None


def attention_implementation(flash_attn: bool) -> str | None:
    """FlashAttention if requested and possible (3 on Hopper, if installed); None for the model's own choice.

    That is PyTorch's SDPA, or eager attention in models that cannot have it, such as gpt-oss.
    """
    if not flash_attn:
        return None
    if not torch.cuda.is_available():
        lacking = "FlashAttention needs a CUDA device"
    elif torch.cuda.get_device_capability() < (8, 0):
        lacking = "FlashAttention 2 needs an Ampere GPU or newer"
    elif torch.cuda.get_device_capability()[0] == 9 and is_flash_attn_3_available():
        return "flash_attention_3"
    elif not is_flash_attn_2_available():
        lacking = "the package flash-attn is not installed (requirements/gpu.txt says how)"
    else:
        return "flash_attention_2"
    logger.info(f"--flash_attn: {lacking}; it goes without")
    return None


def placement(device_map: str | torch.device | None, quantized: bool) -> dict | str | None:
    """The device map: split over the GPUs of one process, whole on a device or on this GPU, or left to the trainer.

    Under torchrun every process holds the whole model: splitting it there puts all copies on the same GPUs.
    """
    if not torch.cuda.is_available():
        return None
    if isinstance(device_map, torch.device):
        return {"": device_map}
    n_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if n_processes > 1:
        if device_map:
            logger.info(f"--device_map {device_map}: each of {n_processes} processes holds the model on its own GPU")
        return {"": int(os.environ["LOCAL_RANK"])} if quantized else None
    if device_map and torch.cuda.device_count() > 1:
        return device_map
    return {"": torch.cuda.current_device()} if quantized else None


def load_base_model(
    path: str,
    *,
    flag: str = "--model_name_or_path",
    torch_dtype: str = "auto",
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    device_map: str | torch.device | None = None,
    flash_attn: bool = False,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle_weights: bool = False,
    model_class: type | None = None,
    **config_overrides,
) -> PreTrainedModel:
    """Load a base model (not an adapter), quantized if asked for.

    Args:
        torch_dtype: "auto" for the checkpoint's own, or a name such as "bfloat16".
        model_class: the auto class, for a head other than the language model's.
        config_overrides: set in the configuration, such as num_labels=1.
    """
    quantized = load_in_4bit or load_in_8bit
    if quantized and not torch.cuda.is_available():
        _keep_bitsandbytes_weights_plain()
    dtype = "auto" if torch_dtype == "auto" else getattr(torch, torch_dtype)
    compute_dtype = torch.bfloat16 if dtype == "auto" else dtype
    if Path(path).is_dir():
        check_model_files(path, flag, with_weights=True, allow_pickle_weights=allow_pickle_weights)
    hub_options = {"cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
    shipped = load_config(path, flag=flag, **hub_options)
    config = loaded_config(shipped)
    for name, value in config_overrides.items():
        setattr(config, name, value)
    # Only where it is asked for: None would hide how the weights in the folder are quantized.
    bits = {"quantization_config": quantization_config(load_in_4bit, load_in_8bit, compute_dtype)} if quantized else {}
    load = partial(
        (model_class or language_model_class(shipped)).from_pretrained,
        path,
        config=config,
        dtype=dtype,
        device_map=placement(device_map, quantized),
        use_safetensors=None if allow_pickle_weights else True,
        output_loading_info=True,
        **bits,
        **hub_options,
    )
    with explain_load_errors(path, flag), without_load_report():
        model, report = _load_with_attention(load, attention_implementation(flash_attn), path)
    check_loaded(model, report, f"{flag} {path}", has_wrapper=config is not shipped)
    return model


def _load_with_attention(load: Callable, attention: str | None, path: str) -> tuple[PreTrainedModel, dict]:
    """What `load` gives with this attention or, where the model refuses FlashAttention, with its own choice."""
    try:
        model, report = load(attn_implementation=attention)
    except (ValueError, ImportError) as error:  # before any weight is loaded
        if attention is None:
            raise
        logger.info(f"--flash_attn: {path} cannot have it ({str(error).partition('. ')[0]}); it goes without")
        model, report = load(attn_implementation=None)
    if text_config(model.config)._attn_implementation == "eager":
        logger.info(
            f"{path}: {type(model).__name__} has no SDPA in transformers {transformers.__version__}; eager attention "
            "is used, whose memory grows with the square of the length"
        )
    return model, report


def load_saved_weights(model: PreTrainedModel, folder: str) -> bool:
    """Load what `save_pretrained` wrote if it names the tensors otherwise than the model does, as it does for fused
    experts and for parts of a wrapper. False, and nothing is loaded, where the names are the same.
    """
    names = set()
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            names |= set(tensors.keys())
    if names <= model.state_dict().keys():
        return False
    saved = type(model).from_pretrained(folder, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())
    return True


def dtype_for_use(torch_dtype: str, use_cpu: bool = False) -> str:
    """The dtype of weights for use, not for training: float32 without a GPU, since the CPU is fast in it."""
    return torch_dtype if torch.cuda.is_available() and not use_cpu else "float32"


def place_for_use(model: torch.nn.Module, use_cpu: bool = False) -> torch.nn.Module:
    """The model in evaluation mode, on the GPU if there is one."""
    if torch.cuda.is_available() and not (use_cpu or hasattr(model, "hf_device_map")):
        model.to("cuda")
    return model.eval()


def _keep_bitsandbytes_weights_plain() -> None:
    """Stop bitsandbytes 0.50.2 from repacking 4-bit weights for avx512_bf16 CPUs in the first evaluation forward.

    After that, silently, most LoRA matrices get no gradient and a merge gives garbage.
    """
    import bitsandbytes.nn.modules as bnb_modules

    bnb_modules.has_avx512bf16 = lambda: False
