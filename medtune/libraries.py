"""The libraries, imported in half of their time: without what no stage uses, and without collecting garbage.

A script that trains or loads models imports this file before it imports any of them.
"""

import gc
import os
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

import medtune.errors  # noqa: F401 - it silences a line of theirs


@contextmanager
def _set(mapping: MutableMapping, key: str, value: object) -> Iterator[None]:
    """Give a key another value for a while."""
    before = {name: mapping[name] for name in (key,) if name in mapping}
    mapping[key] = value
    try:
        yield
    finally:
        del mapping[key]
        mapping.update(before)


# They make 700,000 objects that all stay: the collector would look through them time and again.
gc.disable()
# transformers 5.24 looks once for scipy, which datasketch brings and None hides: Trainer would import it for the losses
# of object detection.
with _set(sys.modules, "scipy", None):
    import transformers
# Trainer brings PEFT 0.21, and that bitsandbytes 0.50, which compiles what stands in for kernels that CUDA and the CPU
# have: for this all of torch's compiler would be imported.
with _set(os.environ, "TORCHDYNAMO_DISABLE", "1"):
    import transformers.trainer  # noqa: F401
gc.freeze()
gc.enable()
