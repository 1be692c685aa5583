"""Which tests a mutant has to get past: those that mirror its module, those beside them, then those that go deep.

Names only; nothing is imported or run here.
"""

from __future__ import annotations

from typing import Final

# Pure module -> the tests that mirror it, which are asked first.
MIRRORS: Final[dict[str, tuple[str, ...]]] = {
    "job": ("job", "commands", "bodies"),
    "events": ("events",),
    "commands": ("commands", "bodies", "envelope"),
    "errors": ("commands", "bodies"),
    "decide": ("rules",),
    "answers": ("answers", "views", "rules", "worker_api"),
    "batch": ("batch", "rows"),
    "book": ("book",),
    "live_jobs": ("live_jobs", "book"),
    "orders": ("orders", "book"),
    "figures": ("figures",),
    "overlaps": ("overlaps", "figures"),
    "pace": ("pace", "figures"),
    "worker_presence": ("worker_presence", "book"),
    "views": ("views", "rules"),
    "validation": ("validation",),
    "rules": ("rules",),
    "operator_rules": ("rules",),
    "late_rules": ("late_rules",),
    "time_rules": ("rules", "plans_of_time"),
    "reads": ("rules",),
    "steps": ("rules",),
    "draft": ("draft", "rules"),
    "why": ("why",),
    "audit": ("audit",),
    "planning": ("plans", "plans_of_time"),
    "plan_rules": ("plans", "plans_of_time"),
    "fingerprints": ("fingerprints",),
    "webhook": ("webhook",),
    "webhook_addresses": ("webhook_addresses",),
    "webhook_letter": ("webhook",),
    "webhook_line": ("webhook_line",),
    "webhook_rules": ("webhook_rules",),
    "webhook_url": ("webhook_url",),
    "keys": ("keys",),
}
MODULES: Final = tuple(MIRRORS)

# All tests of the first level: in one process, quick, and the same each time.
NEAR: Final = (
    "rules", "late_rules", "book", "orders", "live_jobs", "figures", "overlaps", "pace", "validation", "why", "audit",
    "keys", "envelope", "events", "job", "answers", "draft", "views", "batch", "commands", "bodies", "rows", "plans",
    "plans_of_time", "worker_presence",
    "fingerprints", "webhook", "webhook_addresses", "webhook_line", "webhook_rules", "webhook_url", "actor", "cleanup",
    "alerts", "worker_api", "admin_api",
)  # fmt: skip

# Beside them, some of files that need a daemon for their others.
ALONE: Final = (
    "tests/test_client.py::test_every_refusal_has_an_error_of_its_own_with_the_same_status",
    "tests/test_docs.py::test_every_answer_with_its_fields",
    "tests/test_docs.py::test_every_state_of_health",
    "tests/test_docs.py::test_fields_of_creation_import_and_updates",
    "tests/test_docs.py::test_every_event",
    "tests/test_sweeper.py::test_a_young_object_waits_less_than_a_tombstone_may",
)

# The second level, from cheap to dear: any sequence of commands, small worlds, simulated days.
DEEP: Final = ("tests/mutation/deep.py",)


def files(names: tuple[str, ...]) -> list[str]:
    """Test files by what they mirror."""
    return [f"tests/test_{name}.py" for name in names]
