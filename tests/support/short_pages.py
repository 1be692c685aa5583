"""`python -m tests.support.short_pages …` is jobd whose pages of jobs look at 20 jobs each, in slices of 10."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from jobd.cli.daemon.main import main
from jobd.engine import history
from jobd.model.storage import JobQuery

if __name__ == "__main__":
    short: Any = history
    short.JobQuery, short.MOST_LOOKED, short.SLICE = partial(JobQuery, scan=10), 20, 10
    sys.exit(main())
