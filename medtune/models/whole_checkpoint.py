"""A language model that was taken out of a checkpoint and changed, put back beside what else the checkpoint holds.

A multimodal wrapper's vision tower, layers for multi-token prediction (`mtp.*`) and the like have no place in the
language model that is trained; without them the written folder would be another kind of model.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from loguru import logger
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PretrainedConfig, PreTrainedModel

from medtune.errors import UserError
from medtune.models.loading import base_file, load_config, weight_files
from medtune.models.lora_layers import HEADS
from medtune.models.model_files import WEIGHTS_INDEX
from medtune.models.text_part import loaded_config

# What reads images, sound and video for the other parts, and the vocabulary that llama.cpp's converter reads.
COPIED = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "tokenizer.model")


def add_other_parts(folder: Path, model: PreTrainedModel, base_model: str, **hub_options) -> list[str]:
    """Add to a folder that `model.save_pretrained` wrote all tensors of its base that it lacks, and the wrapper's
    configuration. Returns their names; none where the model is all that its base is.

    Raises:
        UserError: the disk is full.
    """
    base_files = weight_files(base_model, **hub_options)
    where = {name: file for file in base_files for name in _names(file)}
    written_files = sorted(folder.glob("*.safetensors"))
    written = {name: file for file in written_files for name in _names(file)}
    # A head that shares the embeddings' weights is not written, and an untied one not in the base.
    is_head = {name for name in where.keys() | written.keys() if set(name.split(".")) & set(HEADS)}
    shipped = load_config(base_model, **hub_options)
    is_alone = loaded_config(shipped) is not shipped
    if not written.keys() - is_head <= where.keys():
        # Nothing can be told apart; a wrapper has written all its parts itself.
        if is_alone:
            logger.warning(f"{base_model} names its tensors otherwise: {folder.name} holds its language model alone")
        return []
    left_out = sorted(where.keys() - written.keys() - is_head)
    if left_out:
        _check_room(folder, base_files)
        others = {}
        for file in base_files:
            with safe_open(file, framework="pt") as tensors:
                others |= {name: tensors.get_tensor(name) for name in left_out if where[name] == file}
        _write_shards(folder, written_files, written, others)
    if is_alone:
        _write_wrapper_config(folder, model, shipped)
    for name in COPIED:
        if (file := base_file(base_model, name, **hub_options)) and not (folder / name).is_file():
            shutil.copyfile(file, folder / name)
    return left_out


def summarize_parts(names: Iterable[str]) -> str:
    """Tensors by the part they belong to, as `mtp (7), visual (33)`."""
    parts: dict[str, int] = {}
    for name in names:
        part = next(word for word in name.split(".") if word not in ("model", "language_model"))
        parts[part] = parts.get(part, 0) + 1
    return ", ".join(f"{part} ({count})" for part, count in sorted(parts.items()))


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _check_room(folder: Path, base_files: list[Path]) -> None:
    """At most the base's size is needed."""
    free, needed = shutil.disk_usage(folder).free, sum(file.stat().st_size for file in base_files)
    if free < needed:
        raise UserError(
            f"{folder}: the other parts of the base model take up to {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are "
            "free; make room"
        )


def _write_shards(folder: Path, files: list[Path], written: dict[str, Path], others: dict) -> None:
    """One more file of weights, and an index of all."""
    new_names = [f"model-{number:05}-of-{len(files) + 1:05}.safetensors" for number in range(1, len(files) + 2)]
    weight_map = {name: new_names[files.index(file)] for name, file in written.items()}
    # Names of earlier shards are taken by later ones else.
    moved = [file.rename(file.with_suffix(".moved")) for file in files]
    for file, name in zip(moved, new_names, strict=False):
        file.rename(folder / name)
    save_file(others, folder / new_names[-1], metadata={"format": "pt"})
    (folder / new_names[-1]).chmod((folder / "config.json").stat().st_mode)
    weight_map |= dict.fromkeys(others, new_names[-1])
    total = sum((folder / name).stat().st_size for name in new_names)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_wrapper_config(folder: Path, model: PreTrainedModel, shipped: PretrainedConfig) -> None:
    """The base's configuration with the text part's as it is now."""
    shipped.text_config, shipped.dtype = model.config, model.dtype
    if hasattr(shipped, "tie_word_embeddings"):
        shipped.tie_word_embeddings = model.config.tie_word_embeddings
    shipped.save_pretrained(folder)
