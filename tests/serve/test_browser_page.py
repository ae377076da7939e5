"""More of the page in a real browser: files dropped, kept and taken back; layers; several runs."""

import base64
import io
import json
import shlex

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from guidekit.__main__ import main
from serving import Client

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
from browsing import MARKS, WAIT, anew, drag, drawn, follow_red, numbers, quick, titled  # noqa: E402

pytestmark = MARKS
RUN = {"format": 1, "sample": {"model": "scenes", "prompt": "a red circle", "steps": 1}}
DROP = """(files) => {
  const data = new DataTransfer();
  for (const [name, text] of files)
    data.items.add(new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], name));
  for (const kind of ["dragenter", "dragover", "drop"])
    document.body.dispatchEvent(new DragEvent(kind, { dataTransfer: data, bubbles: true }));
}"""


@pytest.fixture
def port(scenes_port):
    return scenes_port


def drop(page, **files):
    """Drops files on the page, by name with their bytes."""
    page.evaluate(DROP, [[name, base64.b64encode(data).decode()] for name, data in files.items()])


def test_a_dropped_image_brings_back_the_image_that_it_followed(page, port, tmp_path):
    follow_red(page, tmp_path)
    quick(page, steps=2)
    id = drawn(page, "finished")
    first = Client(port).image(id, "3.png")
    *_, data = Client(port).raw("GET", f"/api/runs/{id}/files/3.png")
    anew(page)
    drop(page, **{"kept.png": data})
    expect(page.locator("#spoken")).to_have_text("Everything of that run is restored")
    expect(page.locator("#ask-error")).to_be_hidden()
    expect(page.locator(".plugin").get_by_label("image")).to_have_value("given/red.png")
    again = Client(port).image(drawn(page, "finished"), "3.png")
    assert np.array_equal(np.asarray(first), np.asarray(again))
    command = shlex.split(page.locator(".command code").text_content())[1:]
    done = CliRunner().invoke(main, [*command, "--out", str(tmp_path / "o"), "--quiet"])
    assert done.exit_code == 0, done.stderr
    assert np.array_equal(np.asarray(first), np.asarray(Image.open(tmp_path / "o/3.png")))


def test_settings_of_a_run_are_used_again(page, tmp_path):
    follow_red(page, tmp_path)
    page.get_by_label("eta", exact=True).fill("0.5")
    quick(page, steps=2)
    drawn(page, "finished")
    before = numbers(page)
    page.locator("#clear").click()
    page.get_by_label("eta", exact=True).fill("0")
    page.get_by_label("Remove ilvr").click()
    page.locator("#restore").click()
    expect(page.get_by_label("eta", exact=True)).to_have_value("0.5")
    expect(page.locator(".plugin").get_by_label("image")).to_have_value("red.png")
    expect(page.locator("#ask-error")).to_be_hidden()
    assert np.array_equal(numbers(page), before)
    drawn(page, "finished")


def test_a_dropped_layout_leaves_settings_and_their_files(page, tmp_path):
    follow_red(page, tmp_path)
    layout = {"prompt": "a red circle", "segments": [{"phrase": "circle", "box": [0, 0, 1, 0.5]}]}
    drop(page, **{"l.json": json.dumps(layout).encode()})
    expect(page.get_by_role("textbox", name="Prompt", exact=True)).to_have_value("a red circle")
    quick(page, steps=2)
    drawn(page, "finished")


def test_what_a_run_set_beside_the_knobs_is_seen(page):
    table = {"sample": {"model": "scenes", "prompt": "a red circle", "tries": 2, "steps": 3}}
    drop(page, **{"run.json": json.dumps(table).encode()})
    expect(page.get_by_label("tries", exact=True)).to_have_value("2")
    page.get_by_label("tries", exact=True).fill("")
    page.get_by_label("tries", exact=True).blur()
    assert page.evaluate("'tries' in window.guidekit.state.sample") is False


def test_hidden_layers_are_not_drawn_and_strengths_are(page, port):
    page.get_by_label("Show red circle").click()
    expect(page.get_by_label("Show red circle")).to_have_text("Hidden")
    page.get_by_label("Strength of blue square").fill("0.5")
    seen = page.evaluate(
        """() => { const { width, height } = document.getElementById("canvas");
            return [...document.getElementById("canvas").getContext("2d")
              .getImageData(0, 0, width, height).data].filter((_, i) => i % 4 === 3) }"""
    )
    assert np.array_equal(np.array(seen) > 0, (numbers(page) == 2).ravel())
    quick(page, steps=1)
    run = Client(port).get(f"/api/runs/{drawn(page, 'finished')}")
    (segment,) = run["records"][""]["segment"]
    assert (segment["phrase"], segment["strength"]) == ("blue square", 0.5)


def test_opacity_is_that_of_the_canvas(page):
    page.locator("#opacity").fill("25")
    alpha = page.evaluate(
        """() => Math.max(...document.getElementById("canvas").getContext("2d")
            .getImageData(0, 0, 256, 256).data.filter((_, i) => i % 4 === 3))"""
    )
    assert alpha == round(0.25 * 255)


def test_a_removed_layer_comes_back_with_its_pixels(page):
    before = numbers(page)
    page.get_by_label("Remove red circle").click()
    assert not (numbers(page) == 1).any()
    expect(page.locator(".layer")).to_have_count(1)
    page.locator("#undo").click()
    expect(page.locator(".layer")).to_have_count(2)
    expect(page.get_by_label("Remove red circle")).to_be_visible()
    assert np.array_equal(numbers(page), before)


def test_the_layer_chosen_by_a_key_is_told(page):
    page.locator("#canvas").focus()
    page.keyboard.press("2")
    expect(page.get_by_label("Paint with blue square")).to_have_attribute("aria-checked", "true")
    expect(page.get_by_label("Paint with red circle")).to_have_attribute("aria-checked", "false")


def test_files_are_kept_from_the_page(page, tmp_path):
    drag(page, (90, 70), (120, 160))
    painted = numbers(page)
    saved = []
    page.on("download", lambda one: saved.append(one))
    page.locator("#save-layout").click()
    page.wait_for_timeout(500)
    found = {one.suggested_filename: one.path().read_bytes() for one in saved}
    assert json.loads(found["layout.json"])["segments"][1]["phrase"] == "blue square"
    kept = Image.open(io.BytesIO(found["map.png"]))
    assert np.array_equal(np.asarray(kept), painted)
    quick(page, steps=1)
    id = drawn(page, "finished")
    for name in ("3.png", "run.json", "layout.json", "map.png"):
        with page.expect_download() as told:
            page.locator("#downloads").get_by_role("link", name=name, exact=True).click()
        assert told.value.suggested_filename in (name, f"{id}-{name}")


def test_a_grid_is_kept_repeated_and_restored(page, port, tmp_path):
    quick(page, steps=1)
    page.locator("#grid summary").click()
    page.locator("#axis-0").select_option("zest.scale")
    page.locator("#values-0").fill("0.5, 2")
    id = drawn(page, "finished")
    page.get_by_text("Files of the cells").click()
    with page.expect_download() as told:
        page.locator(".cellfiles", has_text="0-1").get_by_role("link", name="3.png").click()
    assert told.value.suggested_filename == f"{id}-0-1-3.png"
    command = shlex.split(page.locator(".command code").text_content())[1:]
    done = CliRunner().invoke(main, [*command, "--out", str(tmp_path / "o"), "--quiet"])
    assert done.exit_code == 0, done.stderr
    for cell in ("0-0", "0-1"):
        drawn_here = np.asarray(Client(port).image(id, f"{cell}/3.png"))
        assert np.array_equal(drawn_here, np.asarray(Image.open(tmp_path / "o" / cell / "3.png")))
    page.locator("#values-0").fill("7")
    page.locator("#restore").click()
    expect(page.locator("#values-0")).to_have_value("0.5, 2")
    *_, image = Client(port).raw("GET", f"/api/runs/{id}/files/0-0/3.png")
    drop(page, **{"one.png": image})
    expect(page.locator("#axis-0")).to_have_value("")


def test_of_two_runs_chosen_at_once_the_last_is_shown(page, port):
    quick(page, steps=2)
    first = drawn(page, "finished")
    page.get_by_label("cfg", exact=True).fill("2")
    second = drawn(page, "finished")
    cards = {id: page.locator(f"[data-run='{id}']") for id in (first, second)}
    expect(cards[second]).to_be_visible()
    page.evaluate(
        "(ids) => ids.forEach((id) => document.querySelector(`[data-run='${id}']`).click())",
        [second, first],
    )
    expect(page.locator("#result-title")).to_have_text(titled(first))
    page.wait_for_timeout(500)
    expect(page.locator("#result-title")).to_have_text(titled(first))
    sources = page.locator(".seed .frame img:not(.heat)").evaluate_all(
        "all => all.map((one) => one.src)"
    )
    assert all(f"/runs/{first}/" in source for source in sources)


def test_a_layer_is_painted_over_an_image_of_a_run(page):
    quick(page, steps=1)
    drawn(page, "finished")
    page.get_by_label("Paint over the image of seed 3", exact=True).click()
    expect(page.locator("#under")).to_be_visible()
    before = numbers(page)
    drag(page, (20, 20), (60, 20))
    assert not np.array_equal(numbers(page), before)


def test_keys_draw_once_and_with_what_is_typed(page, port):
    """A field is read though it is not left, and keys and clicks while it is asked draw no more."""
    quick(page, steps=3)
    before = len(Client(port).get("/api/runs")["runs"])
    page.get_by_label("steps", exact=True).fill("2")
    page.evaluate(
        "() => addEventListener('keydown', () => document.querySelector('#draw').click())"
    )
    for _ in range(3):
        page.keyboard.down("Control")
        page.keyboard.down("Enter")
    expect(page.locator("#run-state")).to_have_text("finished", timeout=WAIT)
    runs = Client(port).get("/api/runs")["runs"]
    assert len(runs) == before + 1
    assert runs[-1]["total"] == 2 * 2  # of the guided image and the unguided one


def test_the_last_letter_of_a_phrase_counts_at_once(page, port):
    quick(page, steps=1)
    phrase = page.get_by_label("Phrase").first
    phrase.fill("red circ")
    page.locator("#tokens").wait_for()
    phrase.press_sequentially("le")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#run-state")).to_have_text("finished", timeout=WAIT)
    run = Client(port).get(f"/api/runs/{page.evaluate('() => guidekit.state.run')}")
    assert run["records"][""]["segment"][0]["phrase"] == "red circle"


def test_attention_has_the_phrases_of_its_run(page):
    quick(page, steps=2)
    drawn(page, "finished")
    expect(page.locator("#heat-layer option")).to_have_text(["none", "red circle", "blue square"])
    page.locator("#prompt").fill("a green circle and a blue square on white")
    page.get_by_label("Phrase").first.fill("green circle")
    drawn(page, "finished")
    expect(page.locator("#heat-layer option")).to_have_text(["none", "green circle", "blue square"])


def test_a_mask_that_was_painted_on_is_the_file_again_after_undo(page):
    buffer = io.BytesIO()
    Image.fromarray(np.tri(64, dtype="uint8") * 255).save(buffer, format="PNG")
    drop(page, **{"mask.png": buffer.getvalue()})
    expect(page.locator("#spoken")).to_have_text("The mask is on the layer red circle")
    place = "() => window.guidekit.state.layers[0].place"
    assert page.evaluate(place) == {"mask": "mask.png"}
    page.get_by_label("Paint with red circle").click()
    drag(page, (200, 20), (220, 40))
    assert page.evaluate(place) is None
    page.locator("#undo").click()
    assert page.evaluate(place) == {"mask": "mask.png"}
    page.locator("#redo").click()
    assert page.evaluate(place) is None


def test_clear_takes_what_another_layer_hides_too(page):
    box = [0.2, 0.2, 0.5, 0.5]
    segments = [{"phrase": name, "box": box} for name in ("red circle", "blue square")]
    layout = {"prompt": "a red circle and a blue square", "segments": segments}
    drop(page, **{"layout.json": json.dumps(layout).encode()})
    expect(page.locator("#spoken")).to_have_text("The layout is opened")
    page.locator("#clear").click()
    assert page.evaluate("() => guidekit.state.layers.map((one) => one.place)") == [None, None]
    page.locator("#undo").click()
    assert page.evaluate("() => guidekit.state.layers[0].place") == {"box": box}


def test_a_box_that_is_removed_again_is_nowhere(page):
    layout = {"prompt": "a red circle", "segments": [{"phrase": "red circle", "box": [0, 0, 1, 1]}]}
    drop(page, **{"layout.json": json.dumps(layout).encode()})
    expect(page.locator("#spoken")).to_have_text("The layout is opened")
    page.get_by_label("Remove red circle").click()
    page.locator("#undo").click()
    place = "() => guidekit.state.layers[0].place"
    assert page.evaluate(place) == {"box": [0, 0, 1, 1]}
    page.locator("#redo").click()
    assert page.evaluate(place) is None


def test_files_that_a_browser_cannot_keep_cost_nothing_else(page, tmp_path):
    page.evaluate("() => { window.guidekit.state.files['unused.png'] = 'x'.repeat(6e6); }")
    page.locator("#prompt").fill("a blue square on black")
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-ready", "yes", timeout=WAIT)
    expect(page.locator("#prompt")).to_have_value("a blue square on black")
    expect(page.locator("#ask-error")).to_contain_text("too large for the browser")
    page.evaluate(
        "() => { const { files, sample } = window.guidekit.state;"
        " files['used.png'] = 'x'.repeat(6e6); sample.image = 'used.png'; }"
    )
    page.locator("#prompt").fill("a red circle on white")
    page.reload()
    expect(page.locator("#prompt")).to_have_value("a red circle on white")
    expect(page.locator("#ask-error")).to_contain_text("too large for the browser")


def test_choosing_runs_to_compare_keeps_the_focus(page, port):
    quick(page, steps=1)
    drawn(page, "finished")
    box = page.locator("[data-compare]").first
    box.focus()
    page.keyboard.press("Space")
    drawn(page, "finished")
    other = page.locator("[data-compare]").first
    other.focus()
    page.keyboard.press("Space")
    made = other.element_handle()
    Client(port).finished(Client(port).draw(RUN))  # which makes the list anew
    made.wait_for_element_state("hidden")
    assert page.evaluate("() => 'compare' in document.activeElement.dataset")
    expect(page.locator("#compare")).to_be_enabled()


def test_a_run_that_the_server_has_forgotten_is_told(page, port):
    """As after a new start, when a page still shows a run of before."""
    quick(page, steps=40)
    page.locator("#draw").click()
    expect(page.locator("#stop")).to_be_visible(timeout=WAIT)
    page.route("**/api/runs/*", lambda route: route.fulfill(status=404, json={"error": "no run"}))
    Client(port).ask("DELETE", f"/api/runs/{page.evaluate('() => guidekit.state.run')}")
    expect(page.locator("#run-error")).to_contain_text("has forgotten this run", timeout=WAIT)


def test_several_masks_are_opened_one_by_one(page):
    buffer = io.BytesIO()
    Image.new("L", (8, 8), 255).save(buffer, format="PNG")
    drop(page, **{"a.png": buffer.getvalue(), "b.png": buffer.getvalue()})
    expect(page.locator("#ask-error")).to_have_text(
        "Masks are opened one by one, each for the layer at hand; this is a.png."
    )
