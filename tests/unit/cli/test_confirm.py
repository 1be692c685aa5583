"""Which statuses allow an action that needs a confirmation."""

from __future__ import annotations

from jobd.cli import confirm


def test_the_table_of_transitions_decides_what_is_allowed() -> None:
    def confirmation(to: str | None, only_from: tuple[str, ...] = ()) -> confirm.Confirmation:
        return confirm.Confirmation("x", lambda _: None, to, lambda *_: None, lambda _: "", only_from)  # type: ignore[arg-type, return-value]

    assert confirm._allowed("processing", confirmation("failed"))
    assert not confirm._allowed("completed", confirmation("queued"))
    assert not confirm._allowed("queued", confirmation(None))
    assert confirm._allowed("cancelled", confirmation(None))
    assert not confirm._allowed("queued", confirmation("failed", only_from=("processing",)))
