"""Turn errors of the hub and the loaders into one line that says what to do."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub.constants as hub
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from loguru import logger
from safetensors import SafetensorError
from transformers import PreTrainedModel

from medtune.errors import UserError
from medtune.models.model_files import PICKLE_WEIGHTS, check_model_files
from medtune.offline import go_offline_without_hub

NO_TOKENIZER = (
    "no tokenizer in it; copy tokenizer.json and tokenizer_config.json there, or name --tokenizer_name_or_path"
)


@contextmanager
def explain_load_errors(path: str, flag: str) -> Iterator[None]:
    """Turn what the hub and the loaders raise into one line that says what to do."""
    if Path(path).is_dir():
        check_model_files(path, flag)
    elif not Path(path).exists():
        go_offline_without_hub()
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise UserError(f"{flag} {path}: {reason}") from error


class explain_bad_file:  # noqa: N801 - called as a function, as contextlib.suppress is
    """Turns an error from the values in a file of a local folder into one line that names the file.

    A class, because `tokenizers` raises bare Exception, and `except Exception` would catch everything else too.
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


@contextmanager
def without_load_report() -> Iterator[None]:
    """Without the table of transformers 5.24 on tensors, of which `check_loaded` says what matters in a line."""
    logger_of_loading = logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger_of_loading.addFilter(is_other)
    try:
        yield
    finally:
        logger_of_loading.removeFilter(is_other)


def check_loaded(model: PreTrainedModel, report: dict, where: str, has_wrapper: bool) -> None:
    """Raise UserError where the weights lack tensors of the model, which would be random.

    A classifier's head may be new, and heads of the other kind are left out.

    Args:
        report: `missing_keys` and `unexpected_keys` of transformers' loading info.
        where: the flag and its value.
        has_wrapper: the model is the language model alone of a multimodal checkpoint.
    """
    missing = sorted(report["missing_keys"])
    if type(model).__name__ not in (model.config.architectures or []):
        missing = [name for name in missing if name != "score.weight"]
    if missing:
        others = f" and {missing[-1]}" if missing[1:] else ""
        raise UserError(
            f"{where}: {len(missing)} tensors that config.json asks for are not in its weights and would be random, "
            f"such as {missing[0]}{others}; copy or download both again"
        )
    # Other parts of a wrapper whose language model alone is loaded: `load_for_training` says that they are left out.
    own_parts = {f"{model.base_model_prefix}.{name}" for name, _ in model.base_model.named_children()}
    unused = sorted(
        name
        for name in report["unexpected_keys"]
        if name.split(".")[0] not in ("lm_head", "score")
        and not (has_wrapper and ".".join(name.split(".")[:2]) not in own_parts)
    )
    if unused:
        logger.warning(
            f"{where}: {len(unused)} tensors of its weights have no place in the model of config.json and are left "
            f"out, such as {unused[0]}"
        )


def _reason(error: BaseException) -> str | None:
    """What went wrong and what to do; None if it is no mistake of the user."""
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
        return f"only {PICKLE_WEIGHTS}"
    if "instantiate the backend tokenizer" in text:
        return NO_TOKENIZER
    if "Unrecognized configuration class" in text:
        return "a kind of model that these versions of the libraries give no such head"
    if "Unrecognized model" in text or "does not recognize this architecture" in text:
        return f"not a model that these versions of the libraries know ({text[:100]})"
    if "`ignore_mismatched_sizes`" in text:
        return "config.json and the weights are of two models: their sizes differ; copy or download both again"
    if caused_by(ImportError) and "pip install" in text:  # of a model that another tool quantized
        return text
    if caused_by(StrictDataclassError):
        return f"config.json: {text}; copy or download it again"
    if caused_by(SafetensorError):
        return f"damaged weights ({text}); copy or download them again"
    return None
