"""Tests of jobd. docs/architecture.md describes the folders."""

from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
