"""An all-reduce between the GPUs as data-parallel training does it: whether it ends, is right, and how fast it is.

`N_PROCESSES=2 python -m medtune.launch -m medtune.machine.all_reduce` prints a line of JSON; without GPUs, by gloo.
"""

import json
import os
import sys
import time
from typing import TYPE_CHECKING

from medtune.errors import run_script
from medtune.machine.findings import MIB

if TYPE_CHECKING:
    import torch

ROUNDS = 10


def measure(n_bytes: int, device: "torch.device") -> float:
    """Bytes a second that each process sends, and receives, in a ring: 2 (n - 1) / n of the tensor for n processes.

    Every element of process r is r + 1, so that each sum is n (n + 1) / 2 exactly.

    Raises AssertionError where a sum is wrong.
    """
    import torch
    import torch.distributed as dist

    rank, n_processes = dist.get_rank(), dist.get_world_size()
    gradients = torch.empty(n_bytes // 4, dtype=torch.float32, device=device)
    for round_ in range(ROUNDS + 1):
        gradients.fill_(rank + 1)
        if round_ == 1:  # the first one connects
            _wait(device)
            start = time.perf_counter()
        dist.all_reduce(gradients)
    _wait(device)
    seconds = (time.perf_counter() - start) / ROUNDS
    expected = n_processes * (n_processes + 1) / 2
    lowest, highest = gradients.min().item(), gradients.max().item()
    assert lowest == highest == expected, f"sums from {lowest} to {highest} where all are {expected}"
    return 2 * (n_processes - 1) / n_processes * n_bytes / seconds


def _wait(device: "torch.device") -> None:
    """Until the GPU has done what it was given."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    import torch
    import torch.distributed as dist

    on_gpus = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpus else "gloo")
    rate = measure((256 if on_gpus else 4) * MIB, device)
    if dist.get_rank() == 0:
        peers = [torch.cuda.can_device_access_peer(0, n) for n in range(1, dist.get_world_size())] if on_gpus else []
        sys.stdout.write(json.dumps({"bytes_a_second": rate, "peer_access": all(peers)}) + "\n")
        sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
