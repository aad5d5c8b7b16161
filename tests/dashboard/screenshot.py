"""Makes the screenshots of docs/dashboard.md from a running server.

dspark-server serve --port 8000 &
python -m tests.dashboard.screenshot http://127.0.0.1:8000 docs/figures
"""

import re
import sys
from pathlib import Path

from playwright.sync_api import Browser

from .browser import browsing


def shoot(browser: Browser, url: str, path: Path, *, width: int, height: int, dark: bool, loads: list[int]) -> None:
    """A prompt of the code domain while it streams; `loads` come before it, six seconds each, the last beside it."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light")
    page = context.new_page()
    page.goto(url)
    page.get_by_label("code").check(force=True)
    slider = page.locator("#load")
    for requests in loads:
        slider.fill(str(requests))
        page.wait_for_timeout(6000)
    page.locator("#length").select_option("512")
    page.locator("#run").click()
    page.wait_for_timeout(3000)
    for _ in range(200):  # a moment that shows much: several draft, and some of the newest blocks stood
        several = re.search("[2-9] drafted", page.locator("#sps-note").inner_text())
        if several and page.locator("#blocks li:nth-child(-n+7) .cell.accepted").count() > 8:
            break
        page.wait_for_timeout(50)
    page.screenshot(path=path, full_page=True)
    context.close()
    print(path)


def main(url: str, directory: str) -> None:
    """Light on a desk, dark on a phone."""
    with browsing() as browser:
        shoot(
            browser, url, Path(directory) / "dashboard.png", width=1280, height=900, dark=False, loads=[1, 3, 8, 16, 2]
        )
        shoot(browser, url, Path(directory) / "dashboard-phone.png", width=390, height=844, dark=True, loads=[1, 8, 1])


if __name__ == "__main__":
    main(*sys.argv[1:])
