"""The page in a real browser: painted by mouse, drawn, stopped, reloaded, dropped on, cut off."""

import base64
import io
import json
import re
import time

import numpy as np
import pytest
from PIL import Image

from serving import Client, png

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
from browsing import (  # noqa: E402
    MARKS,
    WAIT,
    Proxy,
    anew,
    drag,
    drawn,
    follow_red,
    near,
    numbers,
    opened,
    quick,
    titled,
)

pytestmark = MARKS


@pytest.fixture
def port(scenes_port):
    return scenes_port


def test_what_is_painted_is_what_arrives(page, port):
    page.locator("#clear").click()
    page.get_by_label("Paint with blue square").click()
    a, b, c = drag(page, (60, 50), (150, 90), (120, 200))
    size = int(page.locator("#size").input_value())
    shape = numbers(page).shape
    wanted = 2 * (near(shape, a, b, size) | near(shape, b, c, size)).astype("uint8")
    assert np.array_equal(numbers(page), wanted)
    quick(page, steps=1)
    run = Client(port).get(f"/api/runs/{drawn(page, 'finished')}")
    sent = Image.open(io.BytesIO(base64.b64decode(run["body"]["files"]["map.png"])))
    assert sent.mode == "L"
    assert np.array_equal(np.asarray(sent), wanted)
    (segment,) = run["records"][""]["segment"]
    assert segment["phrase"] == "blue square"  # the other layer is empty
    mask = np.asarray(Client(port).image(run["id"], segment["mask"]))
    assert np.array_equal(mask, 255 * (wanted == 2).astype("uint8"))


def test_every_tool_does_what_it_says(page):
    page.locator("#clear").click()
    y, x = np.mgrid[:256, :256] + 0.5
    page.get_by_role("radio", name="Box").click()
    (ax, ay), (bx, by) = drag(page, (40, 60), (180, 150))
    box = (x >= ax) & (x <= bx) & (y >= ay) & (y <= by)
    assert np.array_equal(numbers(page), box)
    page.get_by_label("Paint with blue square").click()
    page.get_by_role("radio", name="Ellipse").click()
    (ax, ay), (bx, by) = drag(page, (220, 240), (90, 100))
    cx, cy, rx, ry = (ax + bx) / 2, (ay + by) / 2, abs(bx - ax) / 2, abs(by - ay) / 2
    ellipse = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1
    wanted = np.where(ellipse, 2, box).astype("uint8")
    assert np.array_equal(numbers(page), wanted)
    page.get_by_role("radio", name="Fill").click()
    drag(page, (50, 70))
    filled = np.where(wanted == 1, 2, wanted)  # what is left of the box is in one piece
    assert np.array_equal(numbers(page), filled)
    page.get_by_role("radio", name="Eraser").click()
    a, b = drag(page, (30, 128), (240, 128))
    erased = np.where(near((256, 256), a, b, 28), 0, filled)
    assert np.array_equal(numbers(page), erased)
    for wanted_now in (filled, wanted, box):
        page.locator("#undo").click()
        assert np.array_equal(numbers(page), wanted_now)
    page.keyboard.press("Control+Shift+Z")
    assert np.array_equal(numbers(page), wanted)


def test_previews_arrive_while_it_is_drawn(page):
    quick(page, steps=12)
    page.locator("#draw").click()
    guided = page.locator(".seed .frame img:not(.heat)").first
    expect(guided).to_have_attribute("src", re.compile("^data:image/webp"), timeout=WAIT)
    expect(page.locator("#run-state")).to_have_text(re.compile(r"step \d+ of 12"), timeout=WAIT)
    expect(page.locator("#curves polyline").first).to_be_visible()
    first = guided.get_attribute("src")
    expect(guided).not_to_have_attribute("src", first, timeout=WAIT)
    page.locator("#heat-layer").select_option(label="blue square")
    expect(page.locator("img.heat").first).to_be_visible()
    expect(page.locator("#run-state")).to_have_text("finished", timeout=WAIT)
    expect(guided).to_have_attribute("src", re.compile(r"/files/3\.png$"), timeout=WAIT)
    unguided = page.locator(".seed .frame img:not(.heat)").nth(1)
    expect(unguided).to_have_attribute("src", re.compile(r"/files/unguided/3\.png$"))
    assert "guidekit sample --config" in page.locator(".command code").text_content()


def test_a_run_is_stopped(page, port):
    quick(page, steps=100)
    page.locator("#draw").click()
    expect(page.locator("#run-state")).to_have_text(re.compile(r"step \d+ of 100"), timeout=WAIT)
    page.locator("#stop").click()
    expect(page.locator("#run-state")).to_have_text("stopped", timeout=WAIT)
    expect(page.locator("#stop")).to_be_hidden()
    last = Client(port).get("/api/runs")["runs"][-1]
    assert last["state"] == "stopped"
    assert last["done"] < 100


def test_a_reload_loses_nothing(page):
    page.get_by_role("textbox", name="Prompt", exact=True).fill("a green ring, a blue square")
    page.get_by_label("Phrase").first.fill("green ring")
    drag(page, (100, 100), (140, 60))
    page.get_by_label("scale").first.fill("0.7")
    quick(page, steps=3)
    id = drawn(page)
    page.wait_for_timeout(400)
    before = numbers(page)
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-ready", "yes", timeout=WAIT)
    assert np.array_equal(numbers(page), before)
    expect(page.get_by_role("textbox", name="Prompt", exact=True)).to_have_value(
        "a green ring, a blue square"
    )
    expect(page.get_by_label("Phrase").first).to_have_value("green ring")
    expect(page.get_by_label("scale").first).to_have_value("0.7")
    expect(page.locator("#result-title")).to_have_text(titled(id))


def test_a_dropped_image_restores_everything(page, port, tmp_path):
    page.locator("#clear").click()
    drag(page, (90, 70), (120, 160))
    page.get_by_label("scale").first.fill("0.9")
    quick(page, steps=2)
    painted = numbers(page)
    id = drawn(page, "finished")
    *_, image = Client(port).raw("GET", f"/api/runs/{id}/files/3.png")
    (tmp_path / "kept.png").write_bytes(image)
    anew(page)
    assert not np.array_equal(numbers(page), painted)
    page.locator("#open").set_input_files(tmp_path / "kept.png")
    expect(page.get_by_label("steps", exact=True)).to_have_value("2")
    assert np.array_equal(numbers(page), painted)
    expect(page.get_by_label("scale").first).to_have_value("0.9")
    again = drawn(page, "finished")
    images = [np.asarray(Client(port).image(one, "3.png")) for one in (id, again)]
    assert np.array_equal(*images)


def test_masks_and_layouts_are_opened(page, tmp_path):
    y, x = np.mgrid[:256, :256]
    mask = (x + y) % 7 < 3
    (tmp_path / "m.png").write_bytes(base64.b64decode(png(255 * mask.astype("uint8"))))
    page.locator("#open").set_input_files(tmp_path / "m.png")
    expect(page.locator("#spoken")).to_have_text("The mask is on the layer red circle")
    assert np.array_equal(numbers(page) == 1, mask)
    layout = {"prompt": "a dog on grass", "segments": [{"phrase": "dog", "box": [0.25, 0, 0.5, 1]}]}
    (tmp_path / "l.json").write_text(json.dumps(layout))
    page.locator("#open").set_input_files(tmp_path / "l.json")
    expect(page.get_by_role("textbox", name="Prompt", exact=True)).to_have_value("a dog on grass")
    assert np.array_equal(numbers(page), np.broadcast_to((x >= 64) & (x < 128), (256, 256)))


def test_an_image_can_be_followed(page, port, tmp_path):
    follow_red(page, tmp_path)
    quick(page, steps=3)
    run = Client(port).get(f"/api/runs/{drawn(page, 'finished')}")
    assert run["records"][""]["record"]["edits"]["ilvr"] > 0
    assert list(run["body"]["plugin"]) == ["ilvr"]


def test_a_bad_file_changes_nothing(page, tmp_path):
    before = numbers(page)
    (tmp_path / "bad.png").write_bytes(b"no image at all")
    page.locator("#open").set_input_files(tmp_path / "bad.png")
    expect(page.locator("#ask-error")).to_contain_text("not a readable image")
    (tmp_path / "bad.json").write_text('{"what": 1}')
    page.locator("#open").set_input_files(tmp_path / "bad.json")
    expect(page.locator("#ask-error")).to_contain_text("neither a run.json")
    assert np.array_equal(numbers(page), before)


def test_phrases_show_their_tokens_or_the_error(page):
    expect(page.locator("#tokens .token.used")).to_have_text(["red", "circle", "blue", "square"])
    page.get_by_label("Phrase").first.fill("yellow cat")
    expect(page.locator(".layer .about").first).to_contain_text("Not in the prompt")
    page.locator("#draw").click()
    expect(page.locator("#ask-error")).to_contain_text("not in the prompt")
    page.get_by_role("textbox", name="Prompt", exact=True).fill("a yellow cat and a blue square")
    expect(page.locator(".layer .about").first).to_contain_text("yellow")
    expect(page.locator("#unknown")).to_contain_text("cat")


def test_two_tabs_are_two_drafts_in_one_queue(page, context, port):
    other = opened(context, port)
    other.get_by_role("textbox", name="Prompt", exact=True).fill(
        "a red circle and a blue square on black"
    )
    for tab in (page, other):
        quick(tab, steps=3)
        tab.locator("#draw").click()
    for tab in (page, other):
        expect(tab.locator("#run-state")).to_have_text("finished", timeout=WAIT)
    ids = [tab.evaluate("() => window.guidekit.state.run") for tab in (page, other)]
    assert ids[0] != ids[1]
    expect(page.get_by_role("textbox", name="Prompt", exact=True)).to_have_value(
        re.compile("white background$")
    )
    for id in ids:
        expect(page.locator(f"[data-run='{id}']")).to_contain_text(" s", timeout=WAIT)


def test_two_runs_are_compared(page):
    quick(page, steps=2)
    first = drawn(page, "finished")
    page.get_by_label("cfg", exact=True).fill("2")
    second = drawn(page, "finished")
    for id in (first, second):
        page.locator(f".card:has([data-run='{id}']) input").check()
    page.locator("#compare").click()
    dialog = page.get_by_role("dialog", name="Comparison")
    expect(dialog.locator(".versus img")).to_have_count(2)
    row = dialog.locator(".changes tr", has_text="cfg")
    expect(row.locator("td")).to_have_text(["4", "2"])
    dialog.get_by_role("button", name="Close").click()
    expect(dialog).to_be_hidden()


def test_a_grid_over_two_options(page):
    quick(page, steps=2)
    page.locator("#grid summary").click()
    page.locator("#axis-0").select_option("zest.scale")
    page.locator("#values-0").fill("0.5, 2")
    page.locator("#axis-1").select_option("cfg")
    page.locator("#values-1").fill("1, 4")
    drawn(page, "finished")
    expect(page.locator(".sheet thead th")).to_have_text(["cfg 1", "cfg 4"])
    expect(page.locator(".sheet tbody th")).to_have_text(["zest.scale 0.5", "zest.scale 2"])
    sources = page.locator(".sheet .frame img:not(.heat)").evaluate_all(
        "all => all.map((one) => one.src)"
    )
    assert [source.partition("/files/")[2] for source in sources] == [
        f"{i}-{j}/3.png" for i in (0, 1) for j in (0, 1)
    ]
    expect(page.get_by_role("link", name="sheet.png")).to_be_visible()


def test_a_lost_connection_is_told_and_comes_back(context, port):
    proxy = Proxy(port)
    page = opened(context, proxy.port)
    page.locator("#sampling").get_by_label("compare").uncheck()
    quick(page, steps=40)
    page.locator("#draw").click()
    expect(page.locator("#run-state")).to_have_text(re.compile(r"step \d+ of 40"), timeout=WAIT)
    proxy.cut()
    expect(page.locator("#banner")).to_be_visible(timeout=WAIT)
    drag(page, (30, 30), (60, 60))  # painting goes on without a server
    time.sleep(1)
    proxy.open = True
    expect(page.locator("#banner")).to_be_hidden(timeout=WAIT)
    expect(page.locator("#run-state")).to_have_text("finished", timeout=WAIT)
    points = page.locator("#curves polyline").first.get_attribute("points").split()
    assert len(points) == 30  # zest is tuned to stop at 0.75 of 40 steps; none is lost or twice
    proxy.listening.close()
    page.close()


def test_a_phone(browser, port):
    context = browser.new_context(
        viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True
    )
    context.set_default_timeout(WAIT)
    page = opened(context, port)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.locator("#clear").tap()
    page.locator("#canvas").scroll_into_view_if_needed()
    page.locator("#canvas").tap(position={"x": 100, "y": 100})
    size = page.locator("#canvas").bounding_box()["width"]
    found = numbers(page)
    place = (100 * 256 / size, 100 * 256 / size)
    assert np.array_equal(found == 1, near(found.shape, place, place, 28))
    quick(page, steps=2)
    drawn(page, "finished")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    context.close()


def test_keys_paint_and_everything_has_a_name(page):
    page.locator("#clear").click()
    page.locator("#canvas").focus()
    for key in ("ArrowRight", "ArrowDown", "2", "Space"):
        page.keyboard.press(key)
    place = (132, 132)
    assert np.array_equal(numbers(page) == 2, near((256, 256), place, place, 28))
    expect(page.locator("#spoken")).to_have_text("Painted")
    page.keyboard.press("r")
    for key in ("Space", *["Shift+ArrowRight"] * 3, *["Shift+ArrowDown"] * 2, "Space"):
        page.keyboard.press(key)
    assert (numbers(page)[132:164, 132:180] == 2).all()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea, canvas, a[href]")]
            .filter((one) => one.ariaHidden !== "true")
            .filter((one) => one.checkVisibility())
            .filter((one) => !(one.ariaLabel || one.textContent.trim() || one.labels?.length))
            .map((one) => one.outerHTML)"""
    )
    assert nameless == []
    assert page.locator("html").get_attribute("lang") == "en"


def test_another_model_has_its_own_knobs(page):
    page.locator("#model").select_option("scenes-ddpm")
    expect(page.get_by_label("cfg", exact=True)).to_have_value("1")
    expect(page.locator("#ask-error")).to_be_hidden()
