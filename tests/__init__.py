"""Tests of jobd, and programs that measure and prove it.

Daemons and tools are started many hundred times here: what has been compiled is kept, as it is where jobd is installed.
"""

import os

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
