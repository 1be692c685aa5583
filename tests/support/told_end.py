"""`python -m tests.support.told_end …` is jobd that says on stderr in which order its parts end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from jobd.cli.daemon.main import main
from jobd.engine.actor import Actor
from jobd.http.server import HttpListener
from jobd.storage.store import Store


def line(text: str) -> None:
    """In one write: the log writes to stderr from a thread of its own, and a line of it may come between two."""
    os.write(2, f"{text}\n".encode())


def tell(kind: type, name: str, said: str) -> None:
    """Whenever `kind.name` begins, and where it is a coroutine when it has ended, a line says so."""
    method: Callable[..., Any] = getattr(kind, name)

    async def slowly(*args: Any, **named: Any) -> Any:
        line(f"begins: {said}")
        result = await method(*args, **named)
        line(f"ended: {said}")
        return result

    def at_once(*args: Any, **named: Any) -> Any:
        line(f"begins: {said}")
        return method(*args, **named)

    setattr(kind, name, at_once if kind is Actor else slowly)


if __name__ == "__main__":
    tell(HttpListener, "stop", "doors")
    tell(Actor, "stop", "actor")
    tell(Store, "close", "store")
    sys.exit(main())
