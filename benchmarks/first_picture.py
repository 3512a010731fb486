"""How long a visitor of the studio waits: from opening the page to the first picture, in a browser.

    python benchmarks/first_picture.py

Needs chromium and playwright. Prints seconds: until the page can be used, until the first preview, until both pictures.
"""

import shutil
import time

from playwright.sync_api import expect, sync_playwright

from attnctl.app.service import Service
from attnctl.demos.api import opened
from attnctl.demos.studio import page


def main() -> None:
    began = time.monotonic()
    service = Service()
    demo = page(service)
    _, address, _ = opened(demo, service, prevent_thread_lock=True)
    print(f"served after {time.monotonic() - began:.1f} s")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        visit = browser.new_page()
        began = time.monotonic()
        visit.goto(address)
        visit.get_by_role("button", name="Generate").click()
        print(f"page after {time.monotonic() - began:.1f} s")
        expect(visit.locator("#preview img")).to_be_visible(timeout=300_000)
        print(f"first preview after {time.monotonic() - began:.1f} s")
        expect(visit.locator("#status")).to_contain_text("Drawn in", timeout=300_000)
        print(f"both pictures after {time.monotonic() - began:.1f} s, of 20 steps each, with heat maps")
        browser.close()
    demo.close()


if __name__ == "__main__":
    main()
