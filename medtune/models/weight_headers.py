"""What the headers of a model's safetensors files say of its weights, which are not read."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import get_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from safetensors import safe_open

from medtune.errors import UserError
from medtune.models.load_errors import explain_load_errors
from medtune.models.loading import weight_files

# torch's names of the floating types that weights are trained in.
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Headers:
    """n_bytes: of all weights; dtype: of most of those in floats of 16 or 32 bits, "" if none is."""

    n_bytes: float
    dtype: str


def read_headers(path: str) -> Headers | None:
    """Of a folder or a hub name (a few kB); None where there are no safetensors files or the hub does not answer."""
    if Path(path).is_dir():
        counts: Counter[str] = Counter()
        for file in weight_files(path):
            with explain_load_errors(path, "the model"), safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                    part = tensors.get_slice(name)
                    counts[part.get_dtype()] += math.prod(part.get_shape())
    else:
        try:
            with explain_load_errors(path, "the model"):
                counts = Counter(get_safetensors_metadata(path).parameter_count)
        except (UserError, OSError, NotASafetensorsRepoError, SafetensorsParsingError):
            return None
    if not counts:
        return None
    floats = [name for name, _ in counts.most_common() if name in _FLOATS]
    return Headers(sum(count * _bits(name) / 8 for name, count in counts.items()), _FLOATS[floats[0]] if floats else "")


def _bits(name: str) -> int:
    """Of a value of safetensors' type, such as BF16, F8_E4M3 or BOOL."""
    digits = re.search(r"\d+", name)
    return int(digits[0]) if digits else 8
