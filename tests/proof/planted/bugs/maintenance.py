"""Bugs in maintenance and webhooks."""

from __future__ import annotations

MAINTAINER = "tests/unit/maintenance/test_maintainer.py"
