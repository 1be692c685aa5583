"""The list of survivors that are argued for: survivors.md, read and compared.

Each mutant is a line of a list, in backticks; the paragraph before the list is the argument for it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

SURVIVORS: Final = Path(__file__).parent / "survivors.md"

_HEADING: Final = re.compile(r"^## `(\w+)`$")
_MUTANT: Final = re.compile(r"^- (`+) ?(.+?) ?\1$")


def argued(text: str) -> dict[str, str]:
    """Full names of mutants, each with the argument for it. A mutant without one is not on the list."""
    found: dict[str, str] = {}
    module, paragraph, is_list = "", "", False
    for line in text.splitlines():
        if heading := _HEADING.match(line):
            module, paragraph, is_list = heading[1], "", False
        elif mutant := _MUTANT.match(line):
            is_list = True
            if module and paragraph:
                name = f"{module}.{mutant[2]}"
                if name in found:
                    raise ValueError(f"{name} is listed twice")
                found[name] = paragraph
        elif line.startswith("- "):
            raise ValueError(f"not the name of a mutant: {line}")
        elif line.strip():
            paragraph = line if is_list or not paragraph else f"{paragraph} {line}"
            is_list = False
        elif not is_list:
            paragraph = paragraph if paragraph else ""
    return found


def as_line(name: str) -> str:
    """How a mutant is written down (its module is in the heading)."""
    told = name.partition(".")[2]
    return f"- `` {told} ``" if "`" in told else f"- `{told}`"
