"""The exception that means "the user can mend this", and how a script ends: on it, by signals, with its launcher."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
# Signals so close are one: a batch system sends it to the launcher and to its processes, and the launcher hands it on.
SECONDS_OF_ONE_SIGNAL = 2


class UserError(ValueError):
    """A mistake the user can mend, as one line: what is wrong, where (`file:line` or flag), what to do."""


def run_script(main: Callable[[], object]) -> None:
    """Run a script's `main`; a `UserError` ends it with its line and exit code 2 instead of a traceback.

    Ctrl-C ends it with 130 wherever nothing has to be saved.
    """
    _stop_with_launcher()
    try:
        main()
    except UserError as error:
        # Under torchrun every process meets the same error: one of them says it.
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _stop_with_launcher() -> None:
    """Get SIGTERM where the launcher is killed (-9): its processes would write on into the folder of the next run."""
    launcher = os.environ.get("LAUNCHER_PID")
    if launcher and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(launcher):
            os.kill(os.getpid(), signal.SIGTERM)


def end_at_next_signal(number: int) -> None:
    """From a handler: the same signal ends the process when it comes again."""
    first = time.monotonic()

    def end(number: int, frame: object) -> None:
        if time.monotonic() - first > SECONDS_OF_ONE_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    signal.signal(number, end)
