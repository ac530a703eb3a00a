"""Errors that the user can fix, and how a script exits: on such an error, at a signal, with its launcher."""

import atexit
import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
# Signals so close are one: a batch system sends it to the launcher and to its processes, and the launcher hands it on.
SECONDS_OF_ONE_SIGNAL = 2
# After this time another process prints its error, since the first process has none.
SECONDS_FOR_THE_FIRST = 15
# Training names its own remedies.
WHERE_NOTHING_TRAINS = (
    "the weights alone do not fit: --load_in_4bit True, or a smaller model; nvidia-smi says what else holds memory"
)

# Misleading lines at import, by logger: bitsandbytes 0.50.2 recommends `kernels` for a path that models/loading.py
# switches off, and DeepSpeed warns of a missing GPU, which `devices` explains.
MISLEADING = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community: ",
    "DeepSpeed": "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.",
}
for name, line in MISLEADING.items():
    logging.getLogger(name).addFilter(lambda record, line=line: not record.getMessage().startswith(line))


class UserError(ValueError):
    """A mistake the user can fix, as one line: what is wrong, where (`file:line` or flag), what to do."""


class Unusable(Exception):  # noqa: N818 - it ends one record, not the run
    """One record cannot be used, in reading or in tokenizing; turned into its `BadRecord`."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def run_script(main: Callable[[], object]) -> NoReturn:
    """Run a script's `main` and exit; a `UserError` gives one line and exit code 2 instead of a traceback.

    Ctrl-C gives exit code 130 if nothing has to be saved.
    """
    _stop_with_launcher()
    code = _exit_code(main)
    if "LOCAL_RANK" in os.environ:
        # With torch 2.13 gloo's threads abort some interpreters that shut down, which turns success into 134.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _exit_code(main: Callable[[], object]) -> int:
    try:
        main()
    except UserError as error:
        # Under torchrun every process meets the same error. The first of them says it, and its end ends the others;
        # an end of theirs would end the first before it has.
        if int(os.environ.get("LOCAL_RANK", "0")) > 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(SECONDS_FOR_THE_FIRST)
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SystemExit as stopped:
        if not isinstance(stopped.code, int):
            raise
        return stopped.code
    except RuntimeError as error:
        # By its name, since not every script imports torch.
        if type(error).__name__ != "OutOfMemoryError":
            raise
        message = f"error: out of memory: {str(error).splitlines()[0]}; {WHERE_NOTHING_TRAINS}"
        print(message, file=sys.stderr, flush=True)
        return 2
    return 0


def _stop_with_launcher() -> None:
    """Get SIGTERM if the launcher is killed (-9); otherwise this process would write into the next run's folder."""
    launcher = os.environ.get("LAUNCHER_PID")
    if launcher and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(launcher):
            os.kill(os.getpid(), signal.SIGTERM)


def end_at_next_signal(number: int) -> None:
    """Called by a handler: the next signal of this kind ends the process."""
    first = time.monotonic()

    def end(number: int, frame: object) -> None:
        if time.monotonic() - first > SECONDS_OF_ONE_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    signal.signal(number, end)
