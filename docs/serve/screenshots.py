"""Screenshots of `guidekit serve` for its page of the documentation.

Run with a server at hand: guidekit serve --out /tmp/shots, then this with its address. It needs
playwright and a Chromium. With `--control NET --control ADAPTER --file SET.json` and the images
edges.png and map.png in the working folder it takes controls.png too.
"""

import re
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

HERE = Path(__file__).parent
WIDE, PHONE = {"width": 1440, "height": 980}, {"width": 390, "height": 844}
ENDED = re.compile("finished|failed|stopped")
WAIT = 600_000


def draw(page: Page, until: re.Pattern[str]) -> None:
    """Draws, and waits for how the run stands."""
    before = page.locator("#result-title").text_content()
    page.locator("#draw").click()
    expect(page.locator("#result-title")).not_to_have_text(before, timeout=WAIT)
    expect(page.locator("#run-state")).to_have_text(until, timeout=WAIT)


def to_result(page: Page) -> None:
    """Scrolls to the images of the run."""
    page.locator("#result").evaluate("one => window.scrollTo(0, one.offsetTop - 16)")
    page.wait_for_timeout(400)


def controls(page: Page) -> None:
    """A run with every control of the server, the first with an image, and a label map."""
    add = page.get_by_label("Add a control")
    names = [one.get_attribute("value") for one in add.locator("option").all()][1:]
    for name in names:
        add.select_option(name)
        card = page.locator("#controls .plugin").last
        card.get_by_label("scale").fill("0.3")
        card.get_by_label("scale").blur()
    page.get_by_label("Image: a new file").first.set_input_files("edges.png")
    page.get_by_label("Map: a new file").set_input_files("map.png")
    page.get_by_label("Label set").select_option(index=-1)
    page.get_by_label("steps", exact=True).fill("8")
    draw(page, ENDED)
    page.locator("#control-part").evaluate("one => window.scrollTo(0, one.offsetTop - 40)")
    page.wait_for_timeout(400)
    page.screenshot(path=HERE / "controls.png")


def main(address: str) -> None:
    """Takes the four screenshots, and that of the controls where the server has some."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport=WIDE)
        page.goto(address)
        expect(page.locator("html")).to_have_attribute("data-ready", "yes", timeout=WAIT)
        page.screenshot(path=HERE / "wide.png")
        page.get_by_label("steps", exact=True).fill("30")
        page.get_by_label("steps", exact=True).blur()
        draw(page, re.compile(r"step 1[4-9] of 30"))
        page.locator("#heat-layer").select_option(label="cake")
        to_result(page)
        page.screenshot(path=HERE / "drawing.png")
        page.locator("#heat-layer").select_option(label="none")
        expect(page.locator("#run-state")).to_have_text(ENDED, timeout=WAIT)
        page.get_by_label("scale").first.fill("0.2")
        page.get_by_label("scale").first.blur()
        draw(page, ENDED)
        for box in page.locator(".card input").all()[:2]:
            box.check()
        page.locator("#compare").click()
        page.wait_for_timeout(600)
        page.screenshot(path=HERE / "comparison.png")
        page.keyboard.press("Escape")
        if page.locator("#control-part").is_visible():
            controls(page)
        page.set_viewport_size(PHONE)
        page.evaluate("window.scrollTo(0, 0)")
        page.wait_for_timeout(400)
        page.screenshot(path=HERE / "phone.png")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
