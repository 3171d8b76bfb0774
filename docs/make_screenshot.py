"""Makes ``docs/images/page.png``, the README's picture of a run's page, from a run of the demo in a real browser."""

import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from mrefali import demo

PICTURE = Path(__file__).parent / "images" / "page.png"

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        outdir = Path(folder, "demo")
        demo(outdir)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 605})
        page.goto(f"file://{outdir}/run/report.html")
        page.screenshot(path=PICTURE)
        browser.close()
