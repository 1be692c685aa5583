"""The bugs, one module for each part of jobd."""

from tests.proof.planted.bugs import cluster, core, engine, http, storage  # noqa: F401 - they register their bugs
from tests.proof.planted.registry import BUGS

__all__ = ["BUGS"]
