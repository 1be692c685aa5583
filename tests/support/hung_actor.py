"""`python -m tests.support.hung_actor …` is jobd whose actor hangs from SIGUSR2 on, while its loop goes on."""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any

from jobd.cli.daemon.main import main
from jobd.engine.actor import Actor


async def hang(*_: Any) -> None:
    await asyncio.Event().wait()


def let_hang(*_: Any) -> None:
    Actor._turn = hang  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    signal.signal(signal.SIGUSR2, let_hang)
    sys.exit(main())
