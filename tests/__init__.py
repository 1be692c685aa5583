"""Tests of jobd, and programs that measure and prove it.

Daemons and tools are started many hundred times here: what has been compiled is kept, as it is where jobd is installed.
They are interrupted as at a terminal, also where all this runs in the background of a shell that ignores Ctrl-C there.
"""

import os
import signal
import threading

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)
