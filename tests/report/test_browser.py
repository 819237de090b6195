"""The page as a browser shows it: Chromium, wide and narrow, light and dark."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.report.synthetic import DEFAULT_ENGINES, ENGINES, SPECS, SPECULATIVE, write_run
from zbench.report import render

pytestmark = pytest.mark.slow

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "full": {"engines": tuple(ENGINES), "specs": SPECS, "divergent": ("transformers generate",)},
    "matrix": {"points": ({"batch": 1}, {"batch": 4}), "prompts": 5, "repeats": 1},
    "drafting": {"engines": SPECULATIVE, "points": ({"context": 128}, {"context": 512}), "prompts": 5, "repeats": 1},
    "failed": {"failing": DEFAULT_ENGINES},
}
# The boxes of all pieces of text that are shown, one per line of text; text in one block never overlaps by itself.
TEXT_BOXES = """
const boxes = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let node = walker.nextNode(); node; node = walker.nextNode()) {
  if (!node.data.trim()) continue;
  const range = document.createRange();
  range.selectNodeContents(node);
  for (const r of range.getClientRects())
    if (r.width > 0 && r.height > 0) boxes.push([node.data.trim(), r.left, r.top, r.right, r.bottom]);
}
return boxes;
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -e '.[test]'")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver on the PATH")
    from selenium.webdriver.chrome.service import Service

    os.environ["SE_OFFLINE"] = "true"  # never fetch a driver
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    running = selenium.Chrome(options=options, service=Service(driver))
    yield running
    running.quit()


def show(browser: Any, page: Path) -> None:
    """With what is folded shown from the start: opened in a shown page, it lies over its neighbours for some frames."""
    opened = page.with_name(f"opened-{page.name}")
    opened.write_text(page.read_text(encoding="utf-8").replace("<details", "<details open"), encoding="utf-8")
    browser.get(opened.as_uri())


@pytest.fixture(scope="module", params=RUNS)
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(write_run(tmp_path_factory.mktemp(request.param), **RUNS[request.param]))


@pytest.fixture(params=[(1280, "light"), (1280, "dark"), (400, "light"), (400, "dark")], ids=lambda p: f"{p[0]}-{p[1]}")
def page(browser: Any, report: Path, request: pytest.FixtureRequest) -> Any:
    width, scheme = request.param
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    show(browser, report)
    browser.scheme = scheme
    return browser


def test_the_page_is_shown_without_a_complaint_and_with_every_figure(page: Any) -> None:
    assert page.get_log("browser") == []
    images = page.execute_script(
        "return [...document.images].map(i => [i.naturalWidth, i.clientWidth, i.clientHeight, i.currentSrc, i.src])"
    )
    assert len(images) == len(page.find_elements("css selector", "figure"))
    for natural, width, height, shown, light in images:
        assert natural > 0 and width > 250 and height > 80
        assert (shown == light) == (page.scheme == "light")


def test_nothing_is_wider_than_the_window(page: Any) -> None:
    assert page.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


def test_no_text_overlaps_another(page: Any) -> None:
    boxes = sorted(page.execute_script(TEXT_BOXES), key=lambda box: box[2])
    assert len(boxes) > 50
    for index, (text, left, top, right, bottom) in enumerate(boxes):
        for other, l2, t2, r2, b2 in boxes[index + 1 :]:
            if t2 >= bottom - 1:
                break
            # Line boxes are taller than letters; a few pixels of shared leading are no overlap.
            overlap = min(right, r2) - max(left, l2), min(bottom, b2) - max(top, t2)
            assert overlap[0] <= 1 or overlap[1] <= 5, (text, other)
