"""Controls and the label map on the page: added by hand, drawn, reloaded, dropped."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

import guidekit
from guidekit import LabelSet
from guidekit.testing.conditioners import control_net, t2i_adapter
from serving import Client, serving

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
from browsing import MARKS, WAIT, drag, drawn, quick  # noqa: E402

pytestmark = MARKS
LABELS = LabelSet("rooms", ("sky", "grass", "sea", "rock"))


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """A server with two networks for `scenes`, one of which sees label maps."""
    from guidekit.serve.options import ServeOptions

    folder, pipe = tmp_path_factory.mktemp("kit"), guidekit.load("scenes")
    control_net(pipe).save_pretrained(folder / "edges-net")
    t2i_adapter(pipe, channels=len(LABELS)).save_pretrained(folder / "map-adapter")
    LABELS.save(folder / "rooms.json")
    own = ServeOptions(
        models=("scenes", "scenes-ddpm"),
        plugins=("zest", "pww"),
        out=folder / "out",
        controls={name: folder / name for name in ("edges-net", "map-adapter")},
        files={"rooms.json": folder / "rooms.json"},
        device="cpu",
        preview=0,
    )
    with serving(own) as port:
        yield port


def test_a_control_and_a_map_are_drawn_kept_and_restored(page, port, tmp_path):
    Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / "map.png")
    numbers = np.arange(64 * 64).reshape(64, 64) // 1024
    Image.fromarray(numbers.astype("uint8")).save(tmp_path / "rooms.png")
    drag(page, (60, 50), (150, 90))
    page.get_by_label("Add a control").select_option("edges-net")
    card = page.locator("#controls .plugin", has_text="edges-net")
    card.get_by_label("Image: a new file").set_input_files(tmp_path / "map.png")
    expect(card.get_by_label("Image", exact=True)).to_have_value("map.png")
    card.get_by_label("scale").fill("0.5")
    card.get_by_label("scale").blur()
    page.get_by_label("Add a control").select_option("map-adapter")
    page.get_by_label("Map: a new file").set_input_files(tmp_path / "rooms.png")
    page.get_by_label("Label set").select_option("rooms.json")
    page.get_by_label("Remove zest").click()
    quick(page, steps=2)
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-ready", "yes", timeout=WAIT)
    expect(page.locator("#controls .plugin")).to_have_count(2)
    id = drawn(page, "finished")
    run = Client(port).get(f"/api/runs/{id}")
    assert run["body"]["control"] == [
        {"model": "edges-net", "image": "map.png", "scale": 0.5},
        {"model": "map-adapter"},
    ]
    for name in ("map.png", "rooms.png"):
        assert (
            run["body"]["files"][name] == base64.b64encode((tmp_path / name).read_bytes()).decode()
        )
    layout = base64.b64decode(run["body"]["files"]["layout.json"])
    assert b'"map":"painted-map.png"' in layout  # the user's own map.png stays what it is
    (record,) = run["records"].values()
    assert [c["class"] for c in record["record"]["controls"]] == ["ControlNetModel", "T2IAdapter"]
    first = np.asarray(Client(port).image(id, "3.png"))
    for seen in page.locator("#controls .seen").all():
        assert seen.evaluate("one => one.naturalWidth") == 64

    *_, data = Client(port).raw("GET", f"/api/runs/{id}/files/3.png")
    Image.open(io.BytesIO(data)).verify()
    (tmp_path / "drawn.png").write_bytes(data)
    page.get_by_label("Remove edges-net").click()
    page.get_by_label("Map", exact=True).select_option("")
    page.locator("#open").set_input_files(tmp_path / "drawn.png")
    expect(page.locator("#controls .plugin")).to_have_count(2)
    expect(page.get_by_label("Label set")).to_have_value("labels.json")
    again = drawn(page, "finished")
    assert np.array_equal(np.asarray(Client(port).image(again, "3.png")), first)

    page.get_by_label("Model").select_option("scenes-ddpm")
    expect(page.locator("#map-part")).to_be_visible()  # what was added stays in sight
    page.get_by_label("Remove edges-net").click()
    page.get_by_label("Remove map-adapter").click()
    expect(page.locator("#control-part")).to_be_hidden()
