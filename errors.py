"""The one exception that means "the user can mend this", and how a script ends on it."""

import os
import signal
import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake the user can mend, as one line: what is wrong, where (`file:line` or flag), what to do."""


def run_script(main: Callable[[], object]) -> None:
    """Run a script's `main`; a `UserError` ends it with its line and exit code 2 instead of a traceback.

    Ctrl-C ends it with 130 wherever nothing has to be saved.
    """
    try:
        main()
    except UserError as error:
        # Under torchrun every process meets the same error: one of them says it.
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
