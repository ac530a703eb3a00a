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
# None hides scipy, which datasketch brings: transformers 5.24 would import it for the losses of object detection.
# bitsandbytes 0.50 compiles what stands in for kernels that CUDA and the CPU have, for which all of torch's compiler
# would be imported. Both come with Trainer, the second by way of PEFT 0.21.
with _set(sys.modules, "scipy", None), _set(os.environ, "TORCHDYNAMO_DISABLE", "1"):
    import transformers.trainer  # noqa: F401
gc.freeze()
gc.enable()
