"""The cache of tokenized data: one process builds, the others wait, and a killed run leaves nothing half done."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

if TYPE_CHECKING:
    from datasets import Dataset

_IMPORTED_AT = time.time()
_MANIFEST = "manifest.json"


@dataclass
class Cache:
    """The rows and the report saved for a key; both None until `save` is called."""

    folder: Path
    rows: "Dataset | None" = None
    report: dict | None = None
    built_at: float = 0.0  # seconds since the epoch

    def save(self, rows: "Dataset", report: dict) -> None:
        """Write rows and report (JSON values), and load them again, memory-mapped."""
        # To a temporary name and then renamed, so that a killed run leaves no folder that looks finished.
        partial = self.folder.with_name(f"{self.folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        # By itself datasets 5.2 writes no file for an empty dataset, and then cannot load it.
        rows.save_to_disk(partial, num_shards=None if len(rows) else 1)
        manifest = {"report": report, "sizes": _sizes(partial), "built_at": time.time()}
        Path(partial, _MANIFEST).write_text(json.dumps(manifest, ensure_ascii=False), encoding="utf-8")
        if self.folder.exists():
            shutil.rmtree(self.folder)
        partial.replace(self.folder)
        written = _load_cache(self.folder)
        assert written.rows is not None, f"{self.folder} was just written and does not load"
        self.rows, self.report = written.rows, written.report


@contextmanager
def open_cache(cache_dir: str | Path, key_parts: dict, overwrite: bool = False) -> Iterator[Cache]:
    """The cache for these key parts: what was saved earlier, or an empty one to fill before the block ends.

    Each process of a launch opens it: the first to get the file lock builds, the others wait and load. No
    process group takes part, so a long tokenization cannot run into its time-out, and a process that dies
    frees the lock.

    Args:
        cache_dir: the folder of all caches, shared by every stage.
        key_parts: all that decides the result, as JSON values: data fingerprint, tokenizer, template, limits.
        overwrite: build again, once a launch.
    """
    key = hashlib.sha256(json.dumps(key_parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    folder = Path(cache_dir, key[:32])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        cache = _load_cache(folder)
        if overwrite:
            # Under a launcher, a cache finished after this process started is a sibling's rebuild. A process
            # that starts later than that builds once more, which costs time and does no harm.
            by_sibling = "LOCAL_RANK" in os.environ and cache.built_at > _IMPORTED_AT
            cache = cache if by_sibling else Cache(folder)
        yield cache


def _load_cache(folder: Path) -> Cache:
    """The saved cache, or an empty one if a file is missing or its size is not the recorded one."""
    from datasets import load_from_disk

    try:
        manifest = json.loads(Path(folder, _MANIFEST).read_text(encoding="utf-8"))
        # Others may come beside them: `datasets` keeps there what a stage maps a loaded dataset to, as packing does.
        if not manifest["sizes"].items() <= _sizes(folder).items():
            return Cache(folder)
        return Cache(folder, load_from_disk(folder), manifest["report"], manifest["built_at"])
    except (FileNotFoundError, ValueError, KeyError):
        return Cache(folder)


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file of a cache but the manifest."""
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.name != _MANIFEST}
