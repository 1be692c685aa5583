"""Static files, vendored libraries and colours."""

from __future__ import annotations

import hashlib
import json
import re

import pytest

from jobd.dashboard.assets import STATIC
from tests.browser import vendor
from tests.support.dashboard_harness import DashboardHarness, text


async def test_static_files_have_their_type_and_are_cached(harness: DashboardHarness) -> None:
    page = text(await (await harness.browser()).get("/"))
    links = re.findall(r'(?:src|href)="(/static/[^"]+)"', page)
    assert len(links) >= 6
    kinds = {"js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8", "svg": "image/svg+xml"}
    for link in links:
        response = await harness.admin.request("GET", link)
        assert (response.status, response.headers["cache-control"]) == (200, "public, max-age=31536000, immutable")
        assert response.headers["content-type"] == kinds[link.partition("?")[0].rpartition(".")[2]]
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.body == (STATIC / link.removeprefix("/static/").partition("?")[0]).read_bytes()
        older = await harness.admin.request("GET", f"{link.partition('?')[0]}?v=older")
        assert older.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(
    "name",
    ["none.js", "..", "../routes.py", "%2e%2e%2froutes.py", "..%2froutes.py", "%2Fetc%2Fpasswd", "base.js%00", ".", ""],
)
async def test_other_files_are_not_served(harness: DashboardHarness, name: str) -> None:
    response = await harness.admin.request("GET", f"/static/{name}")
    assert response.status in (400, 401, 404)
    assert b"jobd.dashboard" not in response.body


def test_vendored_libraries_match_their_digests() -> None:
    manifest = json.loads(vendor.MANIFEST.read_text())
    assert set(manifest) == set(vendor.PACKAGES)
    for name, (version, licence, files) in vendor.PACKAGES.items():
        assert (manifest[name]["version"], manifest[name]["licence"]) == (version, licence)
        assert set(manifest[name]["files"]) == set(files.values())
        assert any("LICENSE" in file for file in files.values())
        for file, digest in manifest[name]["files"].items():
            assert hashlib.sha256((STATIC / file).read_bytes()).hexdigest() == digest, file


PAIRS = [("ink", "paper"), ("ink", "card"), ("dim", "paper"), ("dim", "card"), ("link", "paper"), ("link", "card")]
PAIRS += [("accent-ink", "accent"), ("failed", "card"), ("card", "failed"), ("pause", "pause-on")]
PAIRS += [(front, "pause-row") for front in ("ink", "dim", "link", "failed")]
PAIRS += [(status, f"{status}-on") for status in ("queued", "processing", "completed", "failed", "cancelled")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_enough_contrast(scheme: str) -> None:
    """WCAG AA: 4.5 to 1 for text."""
    light, _, dark = (STATIC / "base.css").read_text().partition("@media (prefers-color-scheme: dark)")
    colours = dict(re.findall(r"--([a-z-]+): #([0-9a-f]{6});", light))
    if scheme == "dark":
        colours |= dict(re.findall(r"--([a-z-]+): #([0-9a-f]{6});", dark))
    for front, back in PAIRS:
        lighter, darker = sorted((_luminance(colours[front]), _luminance(colours[back])), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (front, back)


def _luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
