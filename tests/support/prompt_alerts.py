"""`python -m tests.support.prompt_alerts …` is jobd whose alerts fire and resolve as soon as a look finds a change."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from jobd import daemon
from jobd.cli.daemon.main import main
from jobd.monitoring.alerts import Alerts

if __name__ == "__main__":
    prompt: Any = daemon
    prompt.Alerts = partial(Alerts, hold_ms=0, clear_ms=0)
    sys.exit(main())
