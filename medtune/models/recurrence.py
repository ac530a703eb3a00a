"""Layers that carry something along a row besides attention (states, convolutions), and whether texts stay apart there.

transformers hands them the borders of the texts in a row, which only the kernels of other packages take.
"""

import inspect
import re
import sys

from medtune.models.lineage import base_of
from medtune.models.loading import load_config
from medtune.models.text_attention import has_recurrent_layers
from medtune.models.text_part import language_model_class, loaded_config


def why_texts_mix(path: str, **hub_options) -> str:
    """Why the texts of a row would see each other in the model or adapter at `path`, as far as its configuration tells
    before its weights load; "" where it does not.
    """
    config = loaded_config(load_config(base_of(path), **hub_options))
    language_models = language_model_class(config)._model_mapping
    if type(config) not in language_models:
        return ""
    model_class = language_models[type(config)]
    packages = _lacking_packages(vars(sys.modules[model_class.__module__]))
    if not (packages and has_recurrent_layers(model_class, config)):
        return ""
    return (
        f"the recurrent layers of {config.model_type} keep texts apart only by GPU kernels that are not installed, "
        f"those of {' and '.join(packages)} (requirements/gpu.txt says how)"
    )


def _lacking_packages(names: dict[str, object]) -> list[str]:
    """The packages of the kernels in whose place transformers 5.24 has slow functions, which refuse borders by name."""
    packages = {}
    for function in names.values():
        if not (inspect.isfunction(function) and hasattr(function, "__wrapped__")):
            continue
        try:
            function(seq_idx=True)
        except (TypeError, ValueError) as error:
            if lacking := re.search(r"can't keep packed sequences apart without `(.+?)`", str(error)):
                packages[lacking[1]] = True
    return list(packages)
