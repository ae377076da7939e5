"""A page of `guidekit serve` in a browser: opened, painted on, drawn; a line that can be cut."""

import re
import shutil
import socket
import threading

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

WAIT = 60_000  # milliseconds; machines of CI are slow
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
MARKS = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]
ENDED = re.compile("finished|failed|stopped")


def opened(context, port, errors=None):
    """A tab with the page, ready."""
    tab = context.new_page()
    tab.on("pageerror", lambda error: (errors if errors is not None else []).append(str(error)))
    tab.goto(f"http://127.0.0.1:{port}/")
    expect(tab.locator("html")).to_have_attribute("data-ready", "yes", timeout=WAIT)
    return tab


def anew(page):
    """The page without its draft, as a new tab has it."""
    home = page.url
    page.goto(f"{home}static/icon.svg")  # leaving the page keeps the draft
    page.evaluate("sessionStorage.clear()")
    page.goto(home)
    expect(page.locator("html")).to_have_attribute("data-ready", "yes", timeout=WAIT)


def numbers(page):
    """The map as the page has it; its few layers are digits."""
    height, digits = page.evaluate(
        "() => [window.guidekit.state.map.height, window.guidekit.state.map.values.join('')]"
    )
    return np.frombuffer(digits.encode(), "uint8").reshape(height, -1) - ord("0")


def drag(page, *places):
    """Drags the mouse over places in pixels of the map; returns where it was, in those."""
    box = page.locator("#canvas").bounding_box()
    height, width = 256, 256
    told = []
    for index, (x, y) in enumerate(places):
        at = (
            round(box["x"] + x * box["width"] / width),
            round(box["y"] + y * box["height"] / height),
        )
        page.mouse.move(*at)
        if index == 0:
            page.mouse.down()
        told.append(
            ((at[0] - box["x"]) * width / box["width"], (at[1] - box["y"]) * height / box["height"])
        )
    page.mouse.up()
    return told


def near(shape, a, b, size):
    """Pixels whose centre is no farther than half the size from the line from a to b."""
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    (ax, ay), (bx, by) = a, b
    length = (bx - ax) ** 2 + (by - ay) ** 2
    t = np.clip(((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / max(length, 1e-12), 0, 1)
    found = (x - ax - t * (bx - ax)) ** 2 + (y - ay - t * (by - ay)) ** 2 <= size * size / 4
    found[int(by), int(bx)] = True
    return found


def quick(page, steps=4, seeds="3"):
    """Settings of a short run."""
    page.get_by_label("steps", exact=True).fill(str(steps))
    page.get_by_label("seeds", exact=True).fill(seeds)
    page.get_by_label("seeds", exact=True).blur()


def drawn(page, state=ENDED):
    """Draws, waits for the end, and returns the id of the run."""
    before = page.locator("#result-title").text_content()
    page.locator("#draw").click()
    expect(page.locator("#result-title")).not_to_have_text(before, timeout=WAIT)
    expect(page.locator("#run-state")).to_have_text(state, timeout=WAIT)
    return page.evaluate("() => window.guidekit.state.run")


def titled(id):
    """What the page calls a run."""
    return f"Run {id.partition('-')[0]}"


def follow_red(page, tmp_path):
    """Makes the run follow a red image by ilvr alone."""
    Image.new("RGB", (64, 64), "#d62828").save(tmp_path / "red.png")
    page.locator("#add-file").set_input_files(tmp_path / "red.png")
    page.get_by_label("Add a plugin").select_option("ilvr")
    card = page.locator(".plugin", has_text="ilvr")
    card.get_by_label("image").fill("red.png")
    card.get_by_label("image").blur()
    for name in ("zest", "pww"):
        page.get_by_label(f"Remove {name}").click()


class Proxy:
    """Passes connections on, until it is cut."""

    def __init__(self, port):
        self.target, self.open = port, True
        self.lines = set()
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                near_, _ = self.listening.accept()
            except OSError:
                return
            if not self.open:
                near_.close()
                continue
            far = socket.create_connection(("127.0.0.1", self.target))
            self.lines |= {near_, far}
            for a, b in ((near_, far), (far, near_)):
                threading.Thread(target=self._pass, args=(a, b), daemon=True).start()

    def _pass(self, a, b):
        try:
            while data := a.recv(65536):
                b.sendall(data)
        except OSError:
            pass
        for line in (a, b):
            self._close(line)

    def _close(self, line):
        self.lines.discard(line)
        try:
            line.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        line.close()

    def cut(self):
        self.open = False
        for line in list(self.lines):
            self._close(line)
