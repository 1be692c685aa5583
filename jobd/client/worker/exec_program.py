"""Become a program that gets SIGTERM when its worker ends. This is a main program, and imports nothing of jobd.

The signal reaches the program even if the watchdog is killed together with the worker. A `preexec_fn` would run Python
in the child of a process with threads, which can block forever. The signal is sent when the thread that has started
this process ends.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Final

PR_SET_PDEATHSIG: Final = 1
READY: Final = b"."  # without it, this program has failed, and not the one to execute


def main(parent: str, errors: str, *command: str) -> None:
    """Execute `command`. Write READY to the descriptor `errors` before that and, if it fails, the error number."""
    os.set_inheritable(int(errors), False)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it has ended before
        os._exit(128 + signal.SIGTERM)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them
        signal.signal(number, signal.SIG_DFL)
    os.write(int(errors), READY)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        os.write(int(errors), b"%d" % (error.errno or 0))
        os._exit(127)


if __name__ == "__main__":
    main(*sys.argv[1:])
