"""Whether a base and an adapter belong together, by what the adapter's lineage records."""

from pathlib import Path

from loguru import logger

from medtune.errors import UserError
from medtune.models.lineage import Lineage, read_adapter_config, read_lineage
from medtune.models.loading import load_config, weights_fingerprint
from medtune.models.model_files import LINEAGE


def check_same_family(base_model: str, lora_model: str, **hub_options) -> None:
    """Refuse an adapter on another base, by the weights and sizes that its lineage records.

    A copy of the base under another name or path is accepted with a warning; without a lineage record only if the
    last part of the path is the same. Its own path may hold other weights by now, such as those of a stage that was run
    again.
    """
    config = read_adapter_config(lora_model)
    lineage = read_lineage(lora_model)
    recorded = lineage.base_model if lineage else config.base_model_name_or_path
    if _same_name(recorded, base_model):
        if lineage is not None:
            _check_base_weights(base_model, lora_model, lineage, **hub_options)
        return
    base_config = load_config(base_model, flag="--base_model", **hub_options).get_text_config()
    if lineage is None:
        if Path(recorded).name == Path(base_model).name:
            logger.warning(f"{lora_model} was trained on {recorded}; {base_model} is assumed to be a copy of it")
            return
        raise UserError(
            f"--lora_model {lora_model} was trained on {recorded}, not on {base_model}, and has no {LINEAGE} to "
            f"compare by: pass --base_model {recorded}"
        )
    sizes = (base_config.hidden_size, base_config.vocab_size)
    if sizes != (lineage.hidden_size, lineage.vocab_size):
        raise UserError(
            f"--base_model {base_model} (hidden size {sizes[0]}, vocabulary {sizes[1]}) is not the base of "
            f"{lora_model}, which was trained on {recorded} ({lineage.hidden_size}, {lineage.vocab_size})"
        )
    _check_base_weights(base_model, lora_model, lineage, **hub_options)
    logger.warning(f"{lora_model} was trained on {recorded}; {base_model} has the same sizes and is used as its base")


def _check_base_weights(base_model: str, lora_model: str, lineage: Lineage, **hub_options) -> None:
    """Refuse a base whose weights differ from those that the adapter was trained on, if both are known."""
    fingerprint = weights_fingerprint(base_model, flag="--base_model", **hub_options) if lineage.base_weights else ""
    if not fingerprint or fingerprint == lineage.base_weights:
        return
    if _same_name(lineage.base_model, base_model):
        raise UserError(
            f"--base_model {base_model}: its weights are not those that {lora_model} was trained on any more; give a "
            "copy of those, or train the adapter again"
        )
    raise UserError(
        f"--base_model {base_model} is not the base of {lora_model}, which was trained on {lineage.base_model}: "
        "the sizes are the same, the weights are others (a copy in float16 may differ too: empty base_weights in "
        f"{Path(lora_model, LINEAGE)} to use it)"
    )


def _same_name(recorded: str, given: str) -> bool:
    """Whether both are the same hub name or folder; equal last parts (checkpoint-best) are not enough."""
    return recorded == given or (Path(given).exists() and Path(recorded).resolve() == Path(given).resolve())
