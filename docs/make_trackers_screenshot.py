"""Make docs/pictures/trackers.png: a run's page in MLflow, whose address the run has logged.

python docs/make_trackers_screenshot.py URL     needs Chromium in PATH
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

TARGET = Path(__file__).parent / "pictures" / "trackers.png"
MILLISECONDS = 60 * 1000
"""Longest wait for the page's charts."""
SETTLE_MILLISECONDS = 10 * 1000
"""Wait after the first chart: the page asks the server for ever, so it is never idle."""


def main() -> int:
    """Open the metrics of the run, and take the picture."""
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None or len(sys.argv) != 2:
        sys.stderr.write(f"{__doc__}\n")
        return 2
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(f"{sys.argv[1]}/model-metrics")
        page.locator(".js-plotly-plot").first.wait_for(timeout=MILLISECONDS)
        page.wait_for_timeout(SETTLE_MILLISECONDS)
        page.screenshot(path=TARGET)
        browser.close()
    print(f"{TARGET}: {TARGET.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
