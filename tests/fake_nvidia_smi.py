"""A stand-in for nvidia-smi: it answers -L, --query-gpu, --query-compute-apps and, to anything else, its table."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

CAPABILITIES = {
    **{"K80": "3.7", "P100": "6.0", "V100": "7.0", "T4": "7.5", "A100": "8.0", "RTX 3090": "8.6", "RTX 4090": "8.9"},
    **{"H100": "9.0", "B200": "10.0", "RTX 5090": "12.0"},
}
ANSWERS = """#!{python} -IS
import sys

driver, cuda, cards, processes = {state}
query, _, fields = sys.argv[1].partition("=") if len(sys.argv) > 1 else ("", "", "")
if not cards:
    sys.exit("No devices were found")
elif query == "-L":
    for index, card in enumerate(cards):
        print(f"GPU {{index}}: {{card['name']}} (UUID: GPU-{{index}}a)")
elif query in ("--query-gpu", "--query-compute-apps"):
    known = [card | {{"index": n, "uuid": f"GPU-{{n}}a", "driver_version": driver}} for n, card in enumerate(cards)]
    for row in known if query == "--query-gpu" else processes:
        values = [str(row.get(field.replace(".", "_"), "")) for field in fields.split(",")]
        if "" in values:
            sys.exit(f'Field "{{fields}}" is not a valid field to query.')
        print(", ".join(values))
else:
    print(f"| NVIDIA-SMI {{driver}}    Driver Version: {{driver}}    CUDA Version: {{cuda}} |")
"""


@dataclass
class Card:
    """One GPU, by the names of nvidia-smi's fields; memory in MiB."""

    name: str
    compute_cap: str
    memory_total: int = 24564
    memory_used: int = 1

    @classmethod
    def of(cls, name: str, **memory: int) -> "Card":
        return cls(f"NVIDIA {name}", CAPABILITIES[name], **memory)


def write_nvidia_smi(
    folder: Path, driver: str, cards: Sequence[Card], cuda: str = "12.2", processes: Sequence[dict] = ()
) -> None:
    """Put it into a folder of the PATH. A process is a dict of gpu_uuid, pid, process_name and used_memory (MiB)."""
    state = json.dumps([driver, cuda, [asdict(card) for card in cards], list(processes)])
    folder.mkdir(exist_ok=True)
    (folder / "nvidia-smi").write_text(ANSWERS.format(python=sys.executable, state=state))
    (folder / "nvidia-smi").chmod(0o755)
