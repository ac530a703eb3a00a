"""Whether the files of a model folder are what their names say, before a loader reads them."""

import json
from functools import cache
from pathlib import Path

from safetensors import SafetensorError, safe_open

from medtune.errors import UserError
from medtune.reading.magic_bytes import is_text, misnamed, read_start

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
LINEAGE = "lineage.json"
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
PICKLE_WEIGHTS = (
    "pickle weights (.bin), which can run code when they are opened; convert them to safetensors, or pass "
    "--allow_pickle_weights True if you trust them"
)


def check_model_files(
    path: str | Path, flag: str = "", *, with_weights: bool = False, allow_pickle_weights: bool = False
) -> None:
    """Refuse in one line a local folder with a file that is not what its name says.

    Examples: a Git LFS pointer, a web page, JSON that does not parse, truncated weights.
    """
    folder = Path(path)
    names = {file.name for file in folder.iterdir()}
    faults = ((name, _fault_of(folder / name)) for name in (*JSON_FILES, *TEXT_FILES) if name in names)
    name, fault = next((named_fault for named_fault in faults if named_fault[1]), ("", ""))
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
    """Why a file is not a JSON object with the needed keys. `changed_at` invalidates the cache of a fixed file."""
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


def indexed_files(index: Path) -> set[str]:
    return set(map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))


def _weight_files(folder: Path, names: set[str], allow_pickle_weights: bool) -> list[str]:
    """The weight files that would be loaded; the folder may hold others."""
    tensors = sorted(name for name in names if name.endswith(".safetensors"))
    if ADAPTER_CONFIG in names:
        return [name for name in tensors if name == ADAPTER_WEIGHTS]
    if WEIGHTS_INDEX in names and "model.safetensors" not in names:
        return sorted(indexed_files(folder / WEIGHTS_INDEX) & names)
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
