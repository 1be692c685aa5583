"""`python -m tests.told_end …` is jobd that says on stderr in which order its parts end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from jobd.actor import Actor
from jobd.cli.daemon import main
from jobd.listener import Listener
from jobd.store import Store


def tell(kind: type, name: str, said: str) -> None:
    """Whenever `kind.name` begins, and where it is a coroutine when it has ended, a line says so."""
    method: Callable[..., Any] = getattr(kind, name)

    async def slowly(*args: Any, **named: Any) -> Any:
        print(f"begins: {said}", file=sys.stderr, flush=True)
        result = await method(*args, **named)
        print(f"ended: {said}", file=sys.stderr, flush=True)
        return result

    def at_once(*args: Any, **named: Any) -> Any:
        print(f"begins: {said}", file=sys.stderr, flush=True)
        return method(*args, **named)

    setattr(kind, name, at_once if kind is Actor else slowly)


if __name__ == "__main__":
    tell(Listener, "stop", "doors")
    tell(Actor, "stop", "actor")
    tell(Store, "close", "store")
    sys.exit(main())
