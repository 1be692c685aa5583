"""Take screenshots of every page in every scenario: light and dark, wide and narrow (`make screenshots`).

`ARGS=--readme` takes those of the README into docs/images instead.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

from playwright.sync_api import Browser, Page, sync_playwright

from jobd.model.job import MINUTE_MS
from tests import ROOT
from tests.browser.crowd import fill
from tests.browser.scenarios import CHROMIUM, FLAGS, TROUBLE, DashboardDaemon, cluster_of, make_busy, make_trouble
from tests.browser.shop import Shop
from tests.support.daemon_process import TOKEN

PAGES: Final = {
    "overview": "/",
    "jobs": "/jobs",
    "job": "/jobs/video-004",
    "confirm": "/jobs/video-004/confirm?verb=force-reset",
    "failures": "/failures",
    "queues": "/queues",
    "workers": "/workers",
    "take-back": "/workers/take-back?name=video-worker-3",
    "quiet": "/workers/quiet?host=k8s-b&version=2.4.1",
    "silent": "/jobs/short",
    "alerts": "/alerts",
    "cleanup": "/cleanup",
    "cleanup-confirm": "/cleanup/confirm?what=run",
    "clock": "/clock",
    "webhooks": "/webhooks",
    "webhook": "/webhooks/billing",
    "webhook-resend": "/webhooks/billing/resend-dead-lettered",
    "plan": "/jobs?status=failed",  # the page with the form
    "audit": "/audit",
    "cluster": "/cluster",
    "step-down": "/cluster/step-down",
    "docs": "/docs",
    "docs-worker": "/docs/worker",
}
# Pages that exist in some scenarios only.
ONLY_IN: Final = {
    "job": {"busy", "trouble"},
    "confirm": {"busy", "trouble"},
    "webhook": {"trouble"},
    "take-back": {"trouble"},
    "silent": {"trouble"},
    "webhook-resend": {"trouble"},
    "plan": {"busy", "trouble", "crowd"},
    "cluster": {"leader", "standby"},
    "step-down": {"leader"},
}
SCENARIOS: Final[dict[str, Callable[[DashboardDaemon], None]]] = {
    "empty": lambda daemon: None,
    "busy": make_busy,
    "trouble": make_trouble,
    "crowd": lambda daemon: fill(daemon, 100_000, processing=1_000, failed=5_000, completed=5_000),
}
NODES: Final = ("leader", "standby")  # scenarios of a cluster, which show only the pages of ONLY_IN
WIDTHS: Final = {"wide": 1280, "phone": 390}
README: Final[dict[str, Literal["light", "dark"]]] = {"overview": "light", "job": "dark"}
IMAGES: Final = ROOT / "docs/images"


def shoot(browser: Browser, daemon: DashboardDaemon, name: str, directory: Path, only: list[str]) -> None:
    for scheme in ("light", "dark"):
        for width, pixels in WIDTHS.items():
            context = browser.new_context(viewport={"width": pixels, "height": 800}, color_scheme=scheme)
            page = context.new_page()
            if name == "empty" and not only:
                page.goto(f"{daemon.url}/sign-in")
                page.screenshot(path=directory / f"sign-in-{scheme}-{width}.png")
            sign_in(page, daemon)
            for title, path in PAGES.items():
                if (only and title not in only) or name not in ONLY_IN.get(title, SCENARIOS):
                    continue
                page.goto(daemon.url + path)
                if title == "plan":
                    make_plan(page)
                page.wait_for_load_state("networkidle")
                page.screenshot(path=directory / f"{title}-{name}-{scheme}-{width}.png", full_page="docs" not in title)
            context.close()


def sign_in(page: Page, daemon: DashboardDaemon) -> None:
    page.goto(f"{daemon.url}/sign-in")
    page.fill("input[name=token]", TOKEN)
    page.click("main button")
    page.wait_for_load_state()


def shoot_for_readme() -> None:
    with tempfile.TemporaryDirectory(prefix="jobd-") as directory, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        with Shop(Path(directory)) as shop:
            shop.replay(shop.end_ms - MINUTE_MS)
            pages = {}
            for name, scheme in README.items():
                pages[name] = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme=scheme)
                sign_in(pages[name], shop)
            shop.replay(shop.end_ms)
            for name, path in {"overview": "/", "job": f"/jobs/{shop.video}"}.items():
                pages[name].goto(shop.url + path)
                pages[name].wait_for_load_state("networkidle")
                pages[name].screenshot(path=IMAGES / f"dashboard-{name}.png", full_page=True)
        browser.close()


def make_plan(page: Page) -> None:
    """Select three jobs and make a plan."""
    boxes = page.locator("input[name=ids]")
    for number in range(3):
        boxes.nth(number).check()
    page.get_by_role("button", name="Make a plan").click()
    page.wait_for_url("**/plans/*")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("pages", nargs="*", choices=[[], *PAGES], help="take these pages only")
    options.add_argument("--scenario", "--scene", choices=[*SCENARIOS, *NODES], help="take this scenario only")
    options.add_argument("--to", type=Path, default=Path("build/screenshots"))
    options.add_argument(
        "--readme", action="store_true", help="take the screenshots of the README only, into docs/images"
    )
    chosen = options.parse_args()
    if chosen.readme:
        shoot_for_readme()
        return
    chosen.to.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        for name, make in SCENARIOS.items():
            if chosen.scenario in (None, name):
                with (
                    tempfile.TemporaryDirectory() as directory,
                    DashboardDaemon(Path(directory), TROUBLE * (name == "trouble")) as on,
                ):
                    make(on)
                    shoot(browser, on, name, chosen.to, chosen.pages)
        if chosen.scenario in (None, *NODES):
            with tempfile.TemporaryDirectory() as directory, cluster_of(Path(directory), "a", "b", "c") as nodes:
                for name, node in zip(NODES, nodes, strict=False):
                    if chosen.scenario in (None, name):
                        shoot(browser, node, name, chosen.to, chosen.pages)
        browser.close()
    print(chosen.to)


if __name__ == "__main__":
    main()
