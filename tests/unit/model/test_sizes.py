from __future__ import annotations

import pytest

from jobd.model.sizes import byte_size


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 30, "3.0 GiB"), (1 << 40, "1.0 TiB")],
)
def test_byte_size(count: int, text: str) -> None:
    assert byte_size(count) == text
