"""What tests of reading write and read: turns, files, and the line by which a record or a file is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from medtune.errors import Unusable, UserError
from medtune.reading.keys import Reading

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\n"
    "size 734003200\n"
)
POINTER_FAULT = (
    "a Git LFS pointer, not the file itself of 734 MB; run `git lfs pull` where it was cloned, or download it"
)


def human(text: object) -> dict:
    return {"from": "human", "value": text}


def gpt(text: object, **keys: object) -> dict:
    return {"from": "gpt", "value": text, **keys}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def user(text: object, **keys: object) -> dict:
    return {"role": "user", "content": text, **keys}


def assistant(text: object, **keys: object) -> dict:
    return {"role": "assistant", "content": text, **keys}


def tool(text: str) -> dict:
    return {"role": "tool", "content": text}


def dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def write(path: str | Path, content: str | bytes) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def reason(make: Callable, record: object, reading: Reading | None = None) -> str:
    """`reason: detail` of what a conversion raises."""
    with pytest.raises(Unusable) as refused:
        make(record, "d.jsonl:1", reading or Reading(()))
    return f"{refused.value.reason}: {refused.value.detail}"


def fault_of(action: Callable, *args, **kwargs) -> str:
    """The one line by which an action stops."""
    with pytest.raises(UserError) as error:
        action(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)
