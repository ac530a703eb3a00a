"""torchrun for the launchers: one node, or several by NNODES, NODE_RANK and MASTER_ADDR; it ends as its processes.

torchrun hands a signal on, gives the processes half a minute to save a checkpoint, and ends with 1 and a traceback.
Here they have ten minutes, and the exit code is theirs: 143 after SIGTERM, 130 after Ctrl-C, 2 for a mistake. Where
the launcher itself is killed, they get SIGTERM (`errors.run_script`).

    python -m scripts.launch_processes --nproc_per_node 2 supervised_finetuning.py --model_name_or_path ...
"""

import os
import sys
from collections.abc import Mapping, Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

SECONDS_TO_SAVE = 600


def rendezvous(environment: Mapping[str, str]) -> list[str]:
    """How the processes find each other, as flags of torchrun; exits with 2 where a variable is missing."""
    if environment.get("NNODES", "1") == "1":
        return ["--standalone"]
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR") if not environment.get(name)]
    if missing:
        print(
            f"error: NNODES={environment['NNODES']} needs {' and '.join(missing)}: NODE_RANK counts the nodes from 0, "
            "MASTER_ADDR is the address of node 0",
            file=sys.stderr,
        )
        sys.exit(2)
    return [
        *("--nnodes", environment["NNODES"], "--node_rank", environment["NODE_RANK"]),
        *("--master_addr", environment["MASTER_ADDR"], "--master_port", environment.get("MASTER_PORT", "29500")),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    flags = [*rendezvous(os.environ), "--shutdown_timeout", str(SECONDS_TO_SAVE)]
    os.environ["LAUNCHER_PID"] = str(os.getpid())
    try:
        torchrun([*flags, *(sys.argv[1:] if argv is None else argv)])
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    except ChildFailedError as failed:
        # The process has said what went wrong.
        code = failed.get_first_failure()[1].exitcode
        sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
