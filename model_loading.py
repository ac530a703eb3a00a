"""Weights in and out: tokenizer, base model, quantization, LoRA adapters and where they came from, reward heads.

Adapter lineage: a path that holds `adapter_config.json` stands for its base model plus that adapter. Training
continues the adapter itself, so what a stage writes is always relative to the original base and holds all that
came before. `lineage.json` in the adapter's folder records base, parent, stage, template and data.
"""

import copy
import hashlib
import json
import math
import os
import re
import socket
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub.constants as hub
import torch
import torch.nn.functional as F
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from loguru import logger
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.nn.modules.conv import _ConvNd
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file, is_flash_attn_2_available
from transformers.utils import logging as transformers_logging

from errors import UserError
from raw_files import is_text, misnamed, read_start

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
LINEAGE = "lineage.json"
# Beginnings of flags that may change once a stage is finished. What its rows, its steps and its start depend on is
# compared by itself: batches, data and models.
HOW_IT_RUNS = (
    *("--output_dir", "--overwrite", "--resume", "--logging", "--report_to", "--run_name", "--disable_tqdm", "--save"),
    *("--preprocessing", "--dataloader", "--ddp", "--deepspeed", "--use_cpu", "--device_map", "--cache_dir"),
    *("--per_device", "--auto_find", "--gradient_accumulation", "--gradient_checkpointing", "--rollout_batch"),
    *("--flash_attn", "--torch_compile", "--eval", "--train_file_dir"),
    *("--model_name_or_path", "--sft_model_path", "--reward_model_path"),
)
WEIGHTS_INDEX = "model.safetensors.index.json"
# What loaders read of a folder besides weights. A folder may hold more, such as pointers to weights in other forms.
JSON_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "chat_template.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", WEIGHTS_INDEX, ADAPTER_CONFIG, LINEAGE,
)  # fmt: skip
TEXT_FILES = (
    "chat_template.jinja", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
# Of the JSON files, the keys without which they are none of the kind, and what these hold.
NEEDED_KEYS = {"tokenizer.json": {"added_tokens": list, "model": dict}, WEIGHTS_INDEX: {"weight_map": dict}}
# What PEFT takes as it stands and stumbles over later.
ADAPTER_VALUES = {
    "r": int,
    "lora_alpha": int | float,
    "target_modules": str | list | set | None,
    "modules_to_save": list | None,
    "base_model_name_or_path": str | None,
}
DEFAULT_LORA_RANK = 16
DEFAULT_LORA_ALPHA = 32.0
ALL_LINEAR = ("all", "all-linear")
# The last layer under the names that models give it; a reward model's is always called score here.
HEADS = ("lm_head", "embed_out", "score", "classifier")
_NO_TOKENIZER = (
    "no tokenizer in it; copy tokenizer.json and tokenizer_config.json there, or name --tokenizer_name_or_path"
)
_PICKLE = (
    "pickle weights (.bin), which can run code when they are opened; convert them to safetensors, or pass "
    "--allow_pickle_weights True if you trust them"
)
_UNTRAINED = "its score head is all zeros, so it was never trained; take a later checkpoint, or train it longer"
_LEAVE_OR_MERGE = (
    "leave the flag out, or merge the adapter (merge_peft_adapter.py) and start a new one on the merged model"
)


# ---------------------------------------------------------------- paths and lineage


@dataclass(frozen=True)
class Lineage:
    """Where a checkpoint's weights come from; `lineage.json` in its folder.

    base_model: hub name or folder of the model that the adapter (or the full training) started from.
    parent: the adapter that training continued, None for a new one.
    stage, template, data: the script, the prompt template's name ("" is the tokenizer's own), the training data.
    hidden_size, vocab_size: of the base, so that another base is recognized.
    base_weights: `weights_fingerprint` of the base, so that a base of the same sizes is recognized too.
    start_weights: the same of what the stage started from, so that a run is not resumed on others.
    flags: of the command that trained it, with their values as written.
    """

    base_model: str
    parent: str | None
    stage: str
    template: str
    data: str
    hidden_size: int
    vocab_size: int
    base_weights: str = ""
    start_weights: str = ""
    flags: dict[str, str] = field(default_factory=dict)

    def save(self, folder: str | Path) -> None:
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        Path(folder, LINEAGE).write_text(text + "\n", encoding="utf-8")

    def refuse_other_run(self, checkpoint: str, finished: bool) -> None:
        """Raise UserError where the run to resume started from other weights, or was finished with other flags."""
        was = read_lineage(checkpoint)
        if was is None:
            return
        changes = {
            flag: f"{flag} {self.flags.get(flag, 'not given')} ({was.flags.get(flag, 'not given')} then)"
            for flag in sorted(self.flags.keys() | was.flags.keys())
            if self.flags.get(flag) != was.flags.get(flag) and not flag.startswith(HOW_IT_RUNS)
        }
        if was.start_weights and self.start_weights != was.start_weights:
            fault = f"started from other weights than {self.parent or self.base_model} has now"
        elif finished and was.flags and changes:
            fault = f"is finished, with other flags: {', '.join(changes.values())}; give those"
        else:
            return
        raise UserError(
            f"the run in {Path(checkpoint).parent} {fault}; train it again (--resume_from_checkpoint False "
            "--overwrite_output_dir True keeps it beside), or name another --output_dir"
        )


def read_lineage(folder: str | Path) -> Lineage | None:
    """The lineage recorded in a checkpoint's folder; None where there is no record (another tool's adapter)."""
    file = Path(folder, LINEAGE)
    if not file.is_file():
        return None
    try:
        return Lineage(**json.loads(file.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError) as error:
        raise UserError(f"{file}: not a lineage record ({error}); restore it or delete it") from error


def is_adapter(path: str | Path) -> bool:
    return Path(path, ADAPTER_CONFIG).is_file()


def read_adapter_config(path: str | Path) -> LoraConfig:
    """The LoRA configuration of an adapter folder, or UserError where it is no complete LoRA adapter."""
    if not Path(path).is_dir():
        raise UserError(f"{path}: no such folder")
    if not is_adapter(path):
        raise UserError(f"{path}: no {ADAPTER_CONFIG} in it, so it is no LoRA adapter")
    check_model_files(path, with_weights=True)
    try:
        config = PeftConfig.from_pretrained(str(path))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{Path(path, ADAPTER_CONFIG)}: not an adapter's configuration ({error})") from error
    if config.peft_type is None:
        raise UserError(f"{Path(path, ADAPTER_CONFIG)}: not an adapter's configuration (it has no 'peft_type')")
    if not isinstance(config, LoraConfig):
        raise UserError(f"{path}: a {config.peft_type} adapter; only LoRA adapters are read here")
    for name, kind in ADAPTER_VALUES.items():
        if not isinstance(value := getattr(config, name), kind):
            raise UserError(f"{Path(path, ADAPTER_CONFIG)}: {name!r} is {value!r:.60}; copy or download it again")
    if not Path(path, ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{path}: {ADAPTER_WEIGHTS} is missing; take another checkpoint of that run")
    if not config.base_model_name_or_path:
        raise UserError(f"{Path(path, ADAPTER_CONFIG)}: names no base model; fill in base_model_name_or_path")
    return config


def base_of(path: str) -> str:
    """The base model's hub name or folder: an adapter's recorded base, or the path itself."""
    return read_adapter_config(path).base_model_name_or_path if is_adapter(path) else path


def check_model_path(path: str, flag: str, allow_pickle_weights: bool = False) -> None:
    """Refuse in one line a local path that holds no model; a hub name is left to the hub.

    Raises UserError for a missing or incomplete folder, and for pickle weights unless they are allowed.
    """
    folder = Path(path)
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path.split("/")[0]).is_dir()
    if not folder.exists() and looks_local:
        raise UserError(f"{flag} {path}: no such folder")
    if folder.is_file():
        raise UserError(f"{flag} {path}: a file; give the folder that holds the model")
    if not folder.is_dir():
        return
    check_model_files(path, flag, with_weights=True, allow_pickle_weights=allow_pickle_weights)
    if is_adapter(folder):
        base = read_adapter_config(folder).base_model_name_or_path
        check_model_path(base, f"{flag} {path}: its base model", allow_pickle_weights)
        return
    names = {file.name for file in folder.iterdir()}
    if "config.json" not in names:
        raise UserError(f"{flag} {path}: neither config.json (a model) nor {ADAPTER_CONFIG} (an adapter) in it")
    if not any(name.endswith(".safetensors") for name in names):
        if not any(name.endswith(".bin") for name in names):
            raise UserError(f"{flag} {path}: no weights (*.safetensors) in it")
        if not allow_pickle_weights:
            raise UserError(f"{flag} {path}: only {_PICKLE}")
    index = folder / WEIGHTS_INDEX
    if index.is_file():
        absent = sorted(_indexed(index) - names)
        if absent:
            raise UserError(f"{flag} {path}: {', '.join(absent)} of its weights are missing; download it again")


def check_model_files(
    path: str | Path, flag: str = "", *, with_weights: bool = False, allow_pickle_weights: bool = False
) -> None:
    """Refuse in one line a local folder in which a file that loaders read is not what its name says.

    Such as a Git LFS pointer, a web page, JSON that does not parse, weights that are cut off.
    """
    folder = Path(path)
    names = {file.name for file in folder.iterdir()}
    faults = ((name, _fault_of(folder / name)) for name in (*JSON_FILES, *TEXT_FILES) if name in names)
    name, fault = next((found for found in faults if found[1]), ("", ""))
    if not fault and with_weights:
        weights = _weight_files(folder, names, allow_pickle_weights)
        name, fault = next(((name, fault) for name in weights if (fault := _weights_fault(folder / name))), ("", ""))
    if fault:
        raise UserError(f"{flag} {folder}: {name}: {fault}".lstrip())


def _fault_of(file: Path) -> str:
    start = read_start(file, str(file))  # which refuses a link that leads nowhere
    if not start and file.name != "merges.txt":
        return "empty; copy or download it again"
    if file.suffix in (".jinja", ".txt"):
        return misnamed(start) or ("" if is_text(start) else "no text in UTF-8; copy or download it again")
    if file.suffix != ".json":
        return misnamed(start)
    return misnamed(start) or _json_fault(file, file.stat().st_mtime_ns)


@cache
def _json_fault(file: Path, changed_at: int) -> str:
    """Why a file holds no JSON object with what it needs; `changed_at` so that one that was mended is read again."""
    again = "copy or download it again"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        return f"broken JSON: {error.msg} (line {error.lineno}, column {error.colno}); {again}"
    except (UnicodeDecodeError, RecursionError) as error:
        return f"no JSON ({error}); {again}"
    if not isinstance(values, dict):
        return f"holds a JSON {type(values).__name__}, not an object; {again}"
    needed = NEEDED_KEYS.get(file.name, {})
    lacking = [key for key, kind in needed.items() if not isinstance(values.get(key), kind)]
    return f"without {' and '.join(map(repr, lacking))}; {again}" if lacking else ""


def _indexed(index: Path) -> set[str]:
    return set(map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))


def _weight_files(folder: Path, names: set[str], allow_pickle_weights: bool) -> list[str]:
    """The files of weights that would be loaded; others may lie beside them."""
    tensors = sorted(name for name in names if name.endswith(".safetensors"))
    if ADAPTER_CONFIG in names:
        return [name for name in tensors if name == ADAPTER_WEIGHTS]
    if WEIGHTS_INDEX in names and "model.safetensors" not in names:
        return sorted(_indexed(folder / WEIGHTS_INDEX) & names)
    if not tensors and allow_pickle_weights:
        return sorted(name for name in names if name.endswith(".bin"))
    return ["model.safetensors"] if "model.safetensors" in tensors else tensors


def _weights_fault(file: Path) -> str:
    start = read_start(file, str(file))
    if file.suffix == ".bin":
        return "" if start.startswith((b"PK", b"\x80")) else misnamed(start)
    try:
        with safe_open(file, framework="pt"):
            return ""
    except SafetensorError as error:
        return misnamed(start) or f"damaged weights ({error}); copy or download them again"


@contextmanager
def _explained(path: str, flag: str) -> Iterator[None]:
    """Turn what the hub and the loaders raise into one line that says what to do."""
    if Path(path).is_dir():
        check_model_files(path, flag)
    elif not Path(path).exists():
        _go_offline_without_hub()
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise UserError(f"{flag} {path}: {reason}") from error


class _NamingFile:
    """Turns what a loader raises over the values in a local folder's file into one line with the file's name.

    As a class, because `tokenizers` raises bare Exception, which is caught by no narrower name.
    """

    def __init__(self, path: str, flag: str, names: str):
        self.folder = Path(path)
        self.flag = flag
        self.names = names

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        of_values = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
        is_value = kind is Exception or (kind and issubclass(kind, of_values) and not issubclass(kind, UserError))
        # What code of the folder's own raises keeps its traceback.
        if is_value and self.folder.is_dir() and not any(self.folder.glob("*.py")):
            names = "tokenizer.json" if kind is Exception else self.names
            text = " ".join(f"{kind.__name__}: {error}".split())
            raise UserError(f"{self.flag} {self.folder}: {names}: {text}; copy or download it again") from error


def _go_offline_without_hub() -> None:
    """Ask once whether the hub answers: huggingface_hub 2.4 tries one that does not for 46 s a file."""
    address, proxies = urlsplit(hub.ENDPOINT), getproxies()
    if hub.HF_HUB_OFFLINE or address.scheme in proxies or "all" in proxies:
        return
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname, port), timeout=10).close()
    except OSError:
        logger.warning(f"{hub.ENDPOINT} cannot be reached: only models that were downloaded before are found")
        hub.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # PEFT reads this one


def _reason(error: BaseException) -> str | None:
    """What went wrong and what to do, None where it is no mistake of the user."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)

    def caused_by(*kinds: type) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    text = " ".join(str(error).split())
    if caused_by(GatedRepoError):
        return f"a gated model: accept its licence on {hub.ENDPOINT} and set HF_TOKEN to a token of your account"
    if caused_by(RepositoryNotFoundError) or "is not a valid model identifier" in text or "Repo id must" in text:
        return (
            f"neither a folder here nor a public model on {hub.ENDPOINT}: check the name; a private one needs HF_TOKEN"
        )
    if caused_by(LocalEntryNotFoundError, ConnectionError):
        return (
            f"no folder of that name here, and {hub.ENDPOINT} cannot be reached: check the network, set HF_ENDPOINT "
            "to a mirror, or give the folder of a downloaded model"
        )
    if "401" in text:
        return f"{hub.ENDPOINT} does not accept the token in HF_TOKEN: make a new one, or unset it for a public model"
    if "trust_remote_code" in text:
        return "its repository ships Python code: read it, then pass --trust_remote_code True"
    if "thus cannot be loaded with `safetensors`" in text or "no file named model.safetensors" in text:
        return f"only {_PICKLE}"
    if "instantiate the backend tokenizer" in text:
        return _NO_TOKENIZER
    if "Unrecognized configuration class" in text:
        return "a kind of model that these versions of the libraries give no such head"
    if "Unrecognized model" in text or "does not recognize this architecture" in text:
        return f"not a model that these versions of the libraries know ({text[:100]})"
    if "`ignore_mismatched_sizes`" in text:
        return "config.json and the weights are of two models: their sizes differ; copy or download both again"
    if caused_by(ImportError) and "pip install" in text:  # of a model that another tool quantized
        return text
    if "does not support an attention implementation" in text:
        return "a kind of model without PyTorch's SDPA attention in these versions of the libraries, which is used here"
    if caused_by(StrictDataclassError):
        return f"config.json: {text}; copy or download it again"
    if caused_by(SafetensorError):
        return f"damaged weights ({text}); copy or download them again"
    return None


# ---------------------------------------------------------------- tokenizer and base model


def load_tokenizer(
    path: str,
    named: str | None = None,
    *,
    flag: str = "--model_name_or_path",
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model or adapter, or the one that `--tokenizer_name_or_path` names, with a pad token.

    An adapter's own tokenizer, which has the template it was trained with, goes before its base's.
    """
    if named:
        path, flag = named, "--tokenizer_name_or_path"
    source = path if not is_adapter(path) or Path(path, "tokenizer_config.json").is_file() else base_of(path)
    with _NamingFile(source, flag, "tokenizer.json, tokenizer_config.json or config.json"), _explained(source, flag):
        tokenizer = AutoTokenizer.from_pretrained(source, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
    if tokenizer.decode(tokenizer.encode("a", add_special_tokens=False)).strip() != "a":
        # transformers 5.24 makes an empty tokenizer from the config.json of a folder that has no other file.
        raise UserError(f"{flag} {path}: {_NO_TOKENIZER}")
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
    with _NamingFile(path, flag, "config.json"), _explained(path, flag):
        return AutoConfig.from_pretrained(path, **hub_options)


def weights_fingerprint(
    path: str, *, flag: str = "--model_name_or_path", cache_dir: str | None = None, **hub_options
) -> str:
    """Tells a model or an adapter from what further training made of it; a model's copies in float32 and bf16 agree.

    SHA-256 of an adapter's weights, of a model over the first values of each tensor of its safetensors files; "" for
    quantized weights and pickle files.
    """
    if is_adapter(path):
        with Path(path, ADAPTER_WEIGHTS).open("rb") as weights:
            return hashlib.file_digest(weights, "sha256").hexdigest()
    if hasattr(load_config(path, flag=flag, cache_dir=cache_dir, **hub_options), "quantization_config"):
        return ""
    # Offline, a file that the hub does not have is a connection error.
    lenient = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    find = partial(cached_file, path, cache_dir=cache_dir, **lenient)
    names = {"model.safetensors"}
    if index := find(WEIGHTS_INDEX):
        names = _indexed(Path(index))
    first_values = {}
    for name in names:
        if not (file := find(name)):
            return ""
        with _explained(path, flag), safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - it is no mapping
                first_values[key] = tensors.get_slice(key)[:1].flatten()[:64].to(torch.bfloat16)
    whole = hashlib.sha256()
    for key in sorted(first_values.keys() - {"lm_head.weight"}):  # which a copy may hold although it is tied
        whole.update(key.encode() + first_values[key].view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


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


def attention_implementation(flash_attn: bool) -> str:
    """FlashAttention 2 where it is asked for and possible, otherwise PyTorch's SDPA, said in one line."""
    if not flash_attn:
        return "sdpa"
    if not torch.cuda.is_available():
        lacking = "FlashAttention needs a CUDA device"
    elif torch.cuda.get_device_capability() < (8, 0):
        lacking = "FlashAttention 2 needs an Ampere GPU or newer"
    elif not is_flash_attn_2_available():
        lacking = "the package flash-attn is not installed (requirements-gpu.txt says how)"
    else:
        return "flash_attention_2"
    logger.info(f"--flash_attn: {lacking}; PyTorch's SDPA attention is used")
    return "sdpa"


def placement(device_map: str | None, quantized: bool) -> dict | str | None:
    """Where the weights go: split over the GPUs of one process, whole on this process's GPU, or left to the trainer.

    Under torchrun every process holds the whole model: splitting it there puts all copies on the same GPUs.
    """
    if not torch.cuda.is_available():
        return None
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
    device_map: str | None = None,
    flash_attn: bool = False,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle_weights: bool = False,
    model_class: type = AutoModelForCausalLM,
    **config_overrides,
) -> PreTrainedModel:
    """Load a base model (not an adapter), quantized if asked for.

    Args:
        torch_dtype: "auto" for the checkpoint's own, or a name such as "bfloat16".
        model_class: the auto class, for a head other than the language model's.
        config_overrides: passed to the configuration, such as num_labels=1.
    """
    quantized = load_in_4bit or load_in_8bit
    if quantized and not torch.cuda.is_available():
        _keep_bitsandbytes_weights_plain()
    dtype = "auto" if torch_dtype == "auto" else getattr(torch, torch_dtype)
    compute_dtype = torch.bfloat16 if dtype == "auto" else dtype
    # Only where it is asked for: None would hide how the weights in the folder are quantized.
    if quantized:
        config_overrides["quantization_config"] = quantization_config(load_in_4bit, load_in_8bit, compute_dtype)
    if Path(path).is_dir():
        check_model_files(path, flag, with_weights=True, allow_pickle_weights=allow_pickle_weights)
    with _explained(path, flag):
        return model_class.from_pretrained(
            path,
            dtype=dtype,
            device_map=placement(device_map, quantized),
            attn_implementation=attention_implementation(flash_attn),
            cache_dir=cache_dir,
            trust_remote_code=trust_remote_code,
            use_safetensors=None if allow_pickle_weights else True,
            **config_overrides,
        )


def _keep_bitsandbytes_weights_plain() -> None:
    """Stop bitsandbytes 0.50.2 from repacking 4-bit weights for avx512_bf16 CPUs in the first evaluation forward.

    After it most LoRA matrices get no gradient and a merge gives garbage, without a word.
    """
    import bitsandbytes.nn.modules as bnb_modules

    bnb_modules.has_avx512bf16 = lambda: False


# ---------------------------------------------------------------- adapters


def load_for_training(
    path: str,
    *,
    use_peft: bool,
    target_modules: str | None = None,
    lora_rank: int | None = None,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.05,
    use_dora: bool = False,
    use_rslora: bool = False,
    modules_to_save: str | None = None,
    task_type: TaskType = TaskType.CAUSAL_LM,
    **base_options,
) -> PreTrainedModel | PeftModel:
    """The model to train: a base with a new adapter, a base with its adapter continued, or all weights.

    None for rank, alpha or modules means the adapter's own, or for a new adapter 16, 32 and every linear layer.
    With SEQ_CLS it is a reward model, and `pad_token_id` is needed. A language model or its adapter is then the
    start: its LoRA matrices go over as they are, and a score head of zeros is trained and saved with them.

    Raises:
        UserError: the adapter at `path` has another shape than the flags ask for, or is asked to be trained as a
            full model. What an earlier stage learned is never dropped.
    """
    load_base = load_scoring_base if task_type is TaskType.SEQ_CLS else load_base_model
    if is_adapter(path):
        config = read_adapter_config(path)
        has_other_head = task_type is TaskType.SEQ_CLS and config.task_type != TaskType.SEQ_CLS
        if task_type is TaskType.SEQ_CLS:
            config = _without_head(config)
        _check_continuable(
            path,
            config,
            use_peft,
            task_type,
            {
                "--lora_rank": (lora_rank, config.r),
                "--lora_alpha": (lora_alpha, config.lora_alpha),
                "--target_modules": (
                    None if target_modules in ALL_LINEAR else _split_names(target_modules),
                    _last_names(config.target_modules),
                ),
                "--use_dora": (use_dora or None, config.use_dora),
                "--use_rslora": (use_rslora or None, config.use_rslora),
                "--modules_to_save": (_split_names(modules_to_save), _last_names(set(config.modules_to_save or []))),
            },
        )
        base = load_base(config.base_model_name_or_path, **base_options)
        _say_what_is_left_out(base, config.base_model_name_or_path, **base_options)
        config.task_type = task_type.value if has_other_head else config.task_type
        config.lora_dropout = lora_dropout
        config.inference_mode = False
        with _peft_faults_explained(base, path, target_modules, config):
            model = _put_adapter_on(
                base, path, "--model_name_or_path", has_other_head=has_other_head, config=config, is_trainable=True
            )
            bare = _bare_layers(model) if target_modules in ALL_LINEAR else set()
        if bare:
            raise UserError(
                f"--target_modules {target_modules}: the adapter in {path} leaves out {', '.join(sorted(bare))}, and "
                f"training continues it; {_LEAVE_OR_MERGE}"
            )
        return model

    quantized = base_options.get("load_in_4bit") or base_options.get("load_in_8bit")
    if quantized and not use_peft:
        raise UserError("--use_peft False with a quantized base: its weights cannot be trained; use --use_peft True")
    base = load_base(path, **base_options)
    _say_what_is_left_out(base, path, **base_options)
    if not use_peft:
        if base.dtype != torch.float32:
            logger.warning(
                f"all weights are trained in {str(base.dtype).removeprefix('torch.')}, which rounds small updates "
                "away; --torch_dtype float32 keeps them and takes twice the memory for weights, gradients and optimizer"
            )
        return base
    trained_whole = _split_names(modules_to_save)
    config = LoraConfig(
        task_type=task_type,
        r=lora_rank or DEFAULT_LORA_RANK,
        lora_alpha=lora_alpha or DEFAULT_LORA_ALPHA,
        lora_dropout=lora_dropout,
        target_modules=_module_names(target_modules),
        exclude_modules=_beside_language_model(base) if target_modules in (None, *ALL_LINEAR) else None,
        modules_to_save=trained_whole,
        # Otherwise PEFT 0.21 trains a copy of the embeddings, and the head that shared them stays as it was.
        ensure_weight_tying=_has_tied_head(base) and bool(set(trained_whole or []) & set(EMBEDDING_LAYER_NAMES)),
        use_dora=use_dora,
        use_rslora=use_rslora,
    )
    with _peft_faults_explained(base, path, target_modules, config):
        return get_peft_model(base, config)


@contextmanager
def _peft_faults_explained(
    base: PreTrainedModel, path: str, target_modules: str | None, config: LoraConfig
) -> Iterator[None]:
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
            given = f"--lora_dropout {config.lora_dropout:g}" if config.lora_dropout else "--use_dora True"
            instead = "--lora_dropout 0" if config.lora_dropout else "--use_dora False"
            reason = f"{given}: an adapter on the experts of {path} cannot have that; give {instead}"
        elif refused := re.search(r"Module '(\w+)' is incompatible with Mamba", str(error)):
            possible = ",".join(sorted(linear - {refused[1]}))
            reason = f"{flag}: no adapter can be on {refused[1]} of {path}; give --target_modules {possible}"
        else:
            raise
        raise UserError(reason) from error


def _bare_layers(model: PeftModel) -> set[str]:
    """The layers without an adapter that a new adapter on all would cover; PEFT cannot reach some experts."""
    base = model.get_base_model()
    if not linear_module_names(base) - lora_layers(model).keys():
        return set()
    config = LoraConfig(target_modules="all-linear", exclude_modules=_beside_language_model(base))
    with torch.device("meta"):
        skeleton = get_peft_model(type(base)(copy.deepcopy(base.config)), config)
    return lora_layers(skeleton).keys() - lora_layers(model).keys() - set(HEADS)


def _say_what_is_left_out(
    base: PreTrainedModel, path: str, *, cache_dir: str | None = None, trust_remote_code: bool = False, **_
) -> None:
    """Log the parts of a multimodal model that are not loaded, and of experts the loss that no stage adds."""
    config = load_config(path, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
    if isinstance(base.config, type(config.get_text_config())) and not isinstance(base.config, type(config)):
        parts = [name.removesuffix("_config") for name in config.sub_configs if getattr(config, name) is not None]
        others = ", ".join(name for name in parts if name != "text")
        logger.info(f"{path}: its language model alone is loaded, trained and saved; left out: {others}")
    text_config = base.config.get_text_config()
    if hasattr(text_config, "output_router_logits"):
        text_config.output_router_logits = False  # of which a trainer would make that loss
    if any("experts" in module.split(".") for module, _, _ in _matrices(base)):
        logger.info(f"{path}: a mixture of experts; no stage adds its routers' load-balancing loss")


def _check_continuable(
    path: str, config: LoraConfig, use_peft: bool, task_type: TaskType, wanted_and_found: dict[str, tuple]
) -> None:
    """Refuse what a continued adapter cannot become; None is wanted where a flag leaves it as it is."""
    if not use_peft:
        raise UserError(
            f"{path} is a LoRA adapter and --use_peft False trains full weights: merge it first with "
            "merge_peft_adapter.py, then train the merged model"
        )
    # A reward model may start from a language model; the other way round its head would be lost.
    if config.task_type not in (task_type, TaskType.CAUSAL_LM, None):
        raise UserError(f"{path} is a {config.task_type} adapter; this stage continues a {task_type.value} adapter")
    for flag, (wanted, found) in wanted_and_found.items():
        if wanted is not None and _said(wanted) != _said(found):
            raise UserError(
                f"{flag} {_said(wanted)}: the adapter in {path} has {_said(found)}, and training continues it; "
                f"{_LEAVE_OR_MERGE}"
            )


def _without_head(config: LoraConfig) -> LoraConfig:
    """The configuration without a head among its modules: PEFT adds a reward model's by itself, each time."""
    if isinstance(config.target_modules, set | list):
        config.target_modules = {name for name in config.target_modules if name not in HEADS}
    config.modules_to_save = [name for name in config.modules_to_save or [] if name not in HEADS] or None
    config.ensure_weight_tying = False
    return config


def _said(value: object) -> str:
    """A value as one writes it after its flag; modules in one order, numbers without a needless `.0`."""
    if isinstance(value, list | set):
        return ",".join(sorted(value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _has_tied_head(model: PreTrainedModel) -> bool:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is embeddings.weight


def _split_names(names: str | None) -> list[str] | None:
    return [name.strip() for name in names.split(",") if name.strip()] if names else None


def _last_names(target_modules: set[str] | str) -> set[str] | str:
    """PEFT resolves "all-linear" to full names, and shortens them only where there are many; a pattern stays."""
    if isinstance(target_modules, str):
        return target_modules
    return {name.rpartition(".")[2] for name in target_modules}


def _module_names(target_modules: str | None) -> str | list[str]:
    return "all-linear" if target_modules in (None, *ALL_LINEAR) else _split_names(target_modules)


def lora_layers(model: torch.nn.Module) -> Counter[str]:
    """How many layers of each module name have a LoRA adapter; fused experts by module and tensor."""
    return Counter(
        path.rpartition(".")[2] if parameter == "weight" else f"{path.rpartition('.')[2]}.{parameter}"
        for path, parameter in _adapted_tensors(model)
    )


def _adapted_tensors(model: torch.nn.Module) -> Iterator[tuple[str, str]]:
    """The module and its tensor under each LoRA adapter; several on fused experts are wrapped into each other."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and module.lora_A:
            yield path.replace(".base_layer", ""), getattr(module, "parameter_name", "weight")


def _matrices(model: PreTrainedModel) -> Iterator[tuple[str, str, int]]:
    """Module, tensor and number of weights of each matrix of a base, and of each 3D tensor of fused experts.

    Left out are embeddings, convolutions, the head and what is trained whole beside an adapter.
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
    """How many matrices of each kind have no adapter, and the share that they have of all matrices' weights.

    A part beside the language model, such as a vision tower, is one kind.
    """
    base = model.get_base_model()
    beside = _beside_language_model(base)
    adapted = set(_adapted_tensors(base))
    kinds: Counter[str] = Counter()
    sizes = {True: 0, False: 0}
    for path, tensor, size in _matrices(base):
        is_adapted = (path, tensor) in adapted
        sizes[is_adapted] += size
        if not is_adapted:
            part = beside and re.match(beside, path)
            names = [name for name in path.split(".") if not name.isdigit()] + [tensor] * (tensor != "weight")
            kinds[part[1] if part else ".".join(names[-2:])] += 1
    return kinds, sizes[False] / max(sum(sizes.values()), 1)


def _beside_language_model(base: PreTrainedModel) -> str | None:
    """A pattern of the modules of a multimodal model's other parts, whose group is the part's name; None without."""
    decoder = next((path for path, module in base.named_modules() if module is base.get_decoder()), "")
    parent, _, name = decoder.rpartition(".")
    parts = [part for part, _ in base.get_submodule(parent).named_children() if parent and part != name]
    return rf"{re.escape(parent)}\.({'|'.join(map(re.escape, parts))})(?:\..*)?" if parts else None


def linear_module_names(model: PreTrainedModel) -> set[str]:
    """The last names of the linear layers that PEFT's "all-linear" takes: all but the head."""
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return linear - set(HEADS)


def _put_adapter_on(
    base: PreTrainedModel | PeftModel,
    path: str,
    flag: str,
    has_other_head: bool = False,
    adapter_name: str = "default",
    **options,
) -> PeftModel:
    """Load an adapter on its base, beside those that it has, and refuse one that does not fit it tensor by tensor.

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
        with safe_open(Path(path, ADAPTER_WEIGHTS), framework="pt") as file:
            in_file = set(file.keys())
    except (RuntimeError, ValueError) as error:
        if "size mismatch" not in str(error) and "not found in the base model" not in str(error):
            raise
        raise UserError(
            f"{flag} {path}: the adapter does not fit {base.name_or_path}: other layers or sizes"
        ) from error
    weights = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    of_base = model.state_dict().keys() - weights.keys()  # an embedding that PEFT saved with the adapter
    odd = sorted(weights.keys() ^ (in_file - of_base))
    if has_other_head:
        odd = [name for name in odd if not _is_head(name)]
    if odd:
        raise UserError(
            f"{flag} {path}: {len(odd)} tensors are in {ADAPTER_WEIGHTS} and not in {base.name_or_path} with this "
            f"adapter, or the other way round, such as {odd[0]}; take another checkpoint, or the base it was trained on"
        )
    broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(
            f"{flag} {path}: {len(broken)} tensors hold nan or inf, such as {broken[0]}; take an earlier one"
        )
    return model


def _matrices_on(base: PreTrainedModel, path: str, config: LoraConfig) -> PeftModel:
    """A new adapter with the matrices of the one in `path` and the base's head, which PEFT cannot load by itself."""
    model = get_peft_model(base, config)
    heads = {name: weights for name, weights in get_peft_model_state_dict(model).items() if _is_head(name)}
    weights = load_file(Path(path, ADAPTER_WEIGHTS))
    if left_out := [name for name in weights if _is_head(name)]:
        logger.info(f"{path}: {', '.join(left_out)} left out: the head of a reward model stands in its place")
    set_peft_model_state_dict(model, {name: weights[name] for name in weights if not _is_head(name)} | heads)
    return model


def _is_head(tensor_name: str) -> bool:
    return bool(set(HEADS) & set(tensor_name.split(".")))


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


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | PeftModel) -> None:
    """Refuse a tokenizer with ids the model has no embedding for: embeddings are never resized silently."""
    n_rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > n_rows:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has {len(tokenizer)} entries and the model embeddings for "
            f"{n_rows}: give the model's own tokenizer, or resize the model's embeddings and save it first"
        )


def warn_of_dead_tokens(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, turn_ids: list[int], reply_ids: list[int]
) -> None:
    """Warn of turn tokens that the base has never learned, where what is trained leaves their rows as they are.

    Args:
        turn_ids, reply_ids: what the template writes, and of it what the model has to write itself
            (tokenization.turn_token_ids).
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name.rpartition(".")[2] for name, module in model.named_modules() if module in (embeddings, head)}
    dead, untrained = set(), []
    for module, ids in ((embeddings, turn_ids), (head, reply_ids)):
        if not any(weight.requires_grad for weight in module.parameters()):
            untrained.append(names[module])
            dead |= dead_rows(module.weight, ids)
    if dead:
        if _has_tied_head(model):
            untrained = [names[embeddings]]
        logger.warning(
            f"{', '.join(tokenizer.convert_ids_to_tokens(sorted(dead)))}: the model has never learned these tokens of "
            "the template, and this adapter leaves their rows as they are, so that replies may never end: take the "
            "Instruct model, or a --template_name whose tokens the model knows, or train the rows with "
            f"--modules_to_save {','.join(untrained)} or --use_peft False"
        )


def dead_rows(weight: torch.Tensor, ids: list[int]) -> set[int]:
    """Those of the ids whose rows of [vocabulary, hidden] were surely never trained.

    Such a row is all but zero or all but the mean of the rows, as resized embeddings begin (20 times nearer to it
    than the median row), or equals that of another of the ids or of two more tokens. A row that still has a random
    start of its own looks like a trained one and is not found.
    """
    with _gathered(weight):
        sample = weight[:: max(len(weight) // 4096, 1)].float()
        centers = (torch.zeros_like(sample[0]), weight.mean(dim=0, dtype=torch.float32))
        limits = [(sample - center).norm(dim=1).median() / 20 for center in centers]
        dead = set()
        for index in ids:
            row = weight[index]
            near = any((row - center).norm() < limit for center, limit in zip(centers, limits, strict=True))
            same = (weight[:, 0] == row[0]).nonzero().flatten()
            same = set(same[(weight[same] == row).all(dim=1)].tolist()) - {index}
            if near or len(same) > 1 or same & set(ids):
                dead.add(index)
    return dead


def _gathered(weight: torch.Tensor) -> AbstractContextManager:
    """Where ZeRO-3 has split a weight over the processes, the whole of it."""
    if not hasattr(weight, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([weight])


# ---------------------------------------------------------------- reward models


class ScoreHead(torch.nn.Linear):
    """A reward model's head, in float32 inside bfloat16 too, where a score has two or three digits."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(self.weight.device, torch.float32), self.weight)


def load_scoring_base(
    path: str, *, pad_token_id: int, flag: str = "--model_name_or_path", needs_head: bool = False, **base_options
) -> PreTrainedModel:
    """A base model with a head that gives one score; zeros where it has none, so that every score is then 0.

    Args:
        pad_token_id: transformers takes the score at the last token that is not this one, on whichever side the
            padding is; no text that is scored may end with it.
        needs_head: refuse a model without a head of its own, instead of giving it one.
    """
    hub_options = {name: base_options[name] for name in ("cache_dir", "trust_remote_code") if name in base_options}
    config = load_config(path, flag=flag, **hub_options)
    scores_already = any("SequenceClassification" in name for name in config.architectures or [])
    if scores_already and config.num_labels != 1:
        raise UserError(f"{flag} {path}: a classifier with {config.num_labels} classes; a reward model gives one score")
    if needs_head and not scores_already:
        raise UserError(f"{flag} {path}: no reward model: it has no score head; reward_modeling.py trains one")
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what is missing is checked here, with the head expected
    try:
        base, loaded = load_base_model(
            path,
            flag=flag,
            model_class=AutoModelForSequenceClassification,
            num_labels=1,
            output_loading_info=True,
            **base_options,
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    if not isinstance(getattr(base, "score", None), torch.nn.Linear):
        raise UserError(f"{flag} {path}: its head is not called score, as those of language models are")
    missing = sorted(set(loaded["missing_keys"]) - (set() if scores_already else {"score.weight"}))
    if missing:
        raise UserError(f"{flag} {path}: {len(missing)} of its weights are missing, such as {missing[0]}")
    head = ScoreHead(base.score.in_features, 1, bias=False, device=base.score.weight.device, dtype=torch.float32)
    with torch.no_grad():
        head.weight.copy_(base.score.weight) if scores_already else head.weight.zero_()
    base.score = head
    base.config.get_text_config().pad_token_id = pad_token_id
    return base


def load_reward_model(
    base_model: str, lora_model: str | None, *, flag: str = "--reward_model_path", **base_options
) -> PreTrainedModel | PeftModel:
    """A trained reward model for use: an adapter with a score head on its base, or (None) a model that is whole.

    A batch of ids gives `.logits` of [batch, 1], the score at each row's last token.

    Raises:
        UserError: it has no score head, or one that is all zeros and so was never trained.
    """
    hub_options = {name: base_options[name] for name in ("cache_dir", "trust_remote_code") if name in base_options}
    path = lora_model or base_model
    pad_token_id = load_tokenizer(path, flag=flag, **hub_options).pad_token_id
    if lora_model:
        _check_score_head(lora_model, flag)
        check_same_family(base_model, lora_model, **hub_options)
        base = load_scoring_base(base_model, pad_token_id=pad_token_id, flag=flag, **base_options)
        return _put_adapter_on(base, lora_model, flag).eval()
    model = load_scoring_base(base_model, pad_token_id=pad_token_id, flag=flag, needs_head=True, **base_options)
    if not model.score.weight.any():
        raise UserError(f"{flag} {path}: {_UNTRAINED}")
    return model.eval()


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
        if key.split(".")[-2] == name:
            parameter.requires_grad_(False)


def add_reward_adapter(model: PeftModel, path: str, name: str, flag: str = "--reward_model_path") -> torch.Tensor:
    """Put a reward model's LoRA matrices, frozen, on a language model of the same base.

    Returns the [1, hidden] float32 weights of its score head: the last token's last state times them is the score.

    Raises:
        UserError: it has no trained score head, does not fit this base, or holds nan.
    """
    _check_score_head(path, flag)
    config = _without_head(read_adapter_config(path))
    config.task_type, config.lora_dropout = TaskType.CAUSAL_LM.value, 0.0
    weights = load_file(Path(path, ADAPTER_WEIGHTS))
    broken = [key for key, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(f"{flag} {path}: {len(broken)} tensors hold nan or inf, such as {broken[0]}; take another one")
    matrices = {key: tensor for key, tensor in weights.items() if not _is_head(key)}
    add_adapter(model, name, config, matrices, f"{flag} {path}")
    return next(weights[key].float() for key in weights if "score" in key.split("."))


def has_untrained_head(model: PreTrainedModel | PeftModel) -> bool:
    """Whether a reward model's trained head is still all zeros."""
    heads = [weights for name, weights in model.named_parameters() if "score" in name.split(".")]
    return not any(weights.any() for weights in heads if weights.requires_grad)


def _check_score_head(lora_model: str, flag: str) -> None:
    """Refuse an adapter whose file holds no trained score head; PEFT would go on with a random one."""
    config = read_adapter_config(lora_model)
    if config.task_type != TaskType.SEQ_CLS:
        raise UserError(
            f"{flag} {lora_model}: no reward model: a {config.task_type} adapter has no score head; "
            "reward_modeling.py trains one"
        )
    with safe_open(Path(lora_model, ADAPTER_WEIGHTS), framework="pt") as file:
        heads = [name for name in file.keys() if "score" in name.split(".")]  # noqa: SIM118 - it is no mapping
        if not heads:
            raise UserError(f"{flag} {lora_model}: {ADAPTER_WEIGHTS} holds no score head; take another checkpoint")
        if not any(file.get_tensor(name).any() for name in heads):
            raise UserError(f"{flag} {lora_model}: {_UNTRAINED}")


# ---------------------------------------------------------------- base and adapter together


def check_same_family(base_model: str, lora_model: str, **hub_options) -> None:
    """Refuse an adapter on a base it was not trained on, by what its lineage records of the base's weights and sizes.

    A copy of the base under another name or path is accepted and said; without a lineage record, where it bears the
    same last name.
    """
    config = read_adapter_config(lora_model)
    lineage = read_lineage(lora_model)
    recorded = lineage.base_model if lineage else config.base_model_name_or_path
    if _same_name(recorded, base_model):
        return
    base_config = load_config(base_model, flag="--base_model", **hub_options)
    if lineage is None:
        if Path(recorded).name == Path(base_model).name:
            logger.warning(f"{lora_model} was trained on {recorded}; {base_model} is taken for a copy of it")
            return
        raise UserError(
            f"--lora_model {lora_model} was trained on {recorded}, not on {base_model}, and has no {LINEAGE} to "
            f"compare by: pass --base_model {recorded}"
        )
    found = (base_config.hidden_size, base_config.vocab_size)
    if found != (lineage.hidden_size, lineage.vocab_size):
        raise UserError(
            f"--base_model {base_model} (hidden size {found[0]}, vocabulary {found[1]}) is not the base of "
            f"{lora_model}, which was trained on {recorded} ({lineage.hidden_size}, {lineage.vocab_size})"
        )
    _check_base_weights(base_model, lora_model, lineage, **hub_options)
    logger.warning(f"{lora_model} was trained on {recorded}; {base_model} has the same sizes and is used as its base")


def _check_base_weights(base_model: str, lora_model: str, lineage: Lineage, **hub_options) -> None:
    """Refuse a base with other weights than those that the adapter was trained on, where both are known."""
    found = weights_fingerprint(base_model, flag="--base_model", **hub_options) if lineage.base_weights else ""
    if found and found != lineage.base_weights:
        raise UserError(
            f"--base_model {base_model} is not the base of {lora_model}, which was trained on {lineage.base_model}: "
            "the sizes are the same, the weights are others (a copy in float16 may differ too: empty base_weights in "
            f"{Path(lora_model, LINEAGE)} to use it)"
        )


def _same_name(recorded: str, given: str) -> bool:
    """The same hub name or the same folder. Equal last names are not enough: many are checkpoint-best."""
    return recorded == given or (Path(given).exists() and Path(recorded).resolve() == Path(given).resolve())


def load_with_adapter(base_model: str, lora_model: str, **base_options) -> PeftModel:
    """A base with an adapter on it, for use (not for training); checks first that they belong together."""
    return load_with_adapters(base_model, {"default": lora_model}, **base_options)


def load_with_adapters(base_model: str, adapters: dict[str, str], **base_options) -> PeftModel:
    """One base with several adapters on it, for use by `set_adapter`; checks first that they belong together.

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
        model = _put_adapter_on(model, lora_model, "--lora_model", adapter_name=name)
    return model
