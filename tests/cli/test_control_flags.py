"""`--control`, `--map` and `--affinity`: what they draw, what they leave, what they refuse."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import StableDiffusionControlNetPipeline
from PIL import Image
from safetensors.torch import load_file

import tiny
from guidekit.__main__ import main
from guidekit.cli.controls import parse_control
from guidekit.testing.conditioners import control_net, segment_map, t2i_adapter
from segformers import write_segformer

PROMPT = "a red circle and a blue square on white"
SETS = {
    "source": {"classes": ["sky", "grass", "sea"], "palette": ["#0000ff", "#00ff00", "#00ffff"]},
    "target": {"classes": ["lawn", "lake"], "palette": ["#101010", "#f0f0f0"]},
}
IDS = np.zeros((32, 32), np.uint8)
IDS[16:] = 1
SILENT = ("--text", "RN50/nothing", "--segmenter", "nowhere")
CLASSES = ("--control", "{kit}/classes", "--map", "{kit}/map.png")


@pytest.fixture(scope="session")
def kit(tmp_path_factory):
    """Folders of a ControlNet, an adapter, and of the same ControlNet pickled; files beside."""
    folder, pipe = tmp_path_factory.mktemp("kit"), tiny.sd_pipeline()
    control_net(pipe).save_pretrained(folder / "net")
    t2i_adapter(pipe).save_pretrained(folder / "adapter")
    control_net(pipe).save_pretrained(folder / "pickle", safe_serialization=False)
    control_net(tiny.sdxl_pipeline()).save_pretrained(folder / "xl")
    noise = torch.rand(32, 32, 3, generator=torch.Generator().manual_seed(0))
    Image.fromarray((noise * 255).byte().numpy()).save(folder / "image.png")
    Image.fromarray(IDS).save(folder / "map.png")
    Image.fromarray(IDS).save(folder / "map.jpg")
    Image.fromarray(IDS + 5).save(folder / "unknown.png")
    Image.new("RGB", (32, 32), "#123456").save(folder / "colours.png")
    Image.fromarray(np.pad(IDS, ((0, 0), (0, 32)))).save(folder / "wide.png")
    for name, table in SETS.items():
        (folder / f"{name}.json").write_text(json.dumps(table))
    control_net(pipe, channels=2).save_pretrained(folder / "classes")
    control_net(pipe, channels=5).save_pretrained(folder / "wide")
    (folder / "classes/labels.json").write_text('{"classes": ["sky", "sea"]}')
    return folder


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


def sample(model, *args, out="o"):
    words = ("--model", model, "--prompt", PROMPT, "--steps", 2, "--seeds", 0, "--out", out)
    return run("sample", *words, "--json", *args)


def drawn(model, *args, out="o"):
    result = sample(model, *args, out=out)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return np.asarray(Image.open(f"{out}/0.png"))


def write_shots(kit, shots, side):
    """A labelled image of a side's classes."""
    for name in ("images", "masks"):
        (shots / name).mkdir(parents=True)
    Image.open(kit / "image.png").save(shots / "images/1.png")
    Image.fromarray(IDS).save(shots / "masks/1.png")
    (shots / "classes.json").write_text(json.dumps(SETS[side]))


@pytest.fixture
def affinity(kit, tmp_path):
    """A's folder: lawn is grass, lake is sea."""
    write_shots(kit, tmp_path / "shots", "target")
    (tmp_path / "hand.json").write_text('{"lawn": "grass", "lake": {"sea": 3, "sky": 1}}')
    words = ("--source", kit / "source.json", "--hand", "hand.json", "--out", "A")
    result = run("affinity", "shots", *words, "--json")
    assert result.exit_code == 0, (result.stderr, result.exception)
    return tmp_path / "A"


def test_a_control_is_drawn_noted_and_replayed(model, kit):
    text = f"{kit}/net={kit}/image.png@0.5:0-0.5"
    image = drawn(model, "--control", text, "--control", f"{kit}/adapter={kit}/image.png@0.7")
    assert not np.array_equal(image, drawn(model, out="plain"))
    record = json.loads(Path("o/run.json").read_text())
    first, second = record["control"]
    assert first == {
        "model": str(kit / "net"),
        "image": "controls/0.png",
        "scale": 0.5,
        "start": 0.0,
        "stop": 0.5,
        "guess": False,
    }
    assert second["scale"] == 0.7
    assert record["record"]["controls"][1]["class"] == "T2IAdapter"
    again = run("sample", "--config", "o/run.json", "--out", "again", "--json")
    assert again.exit_code == 0, again.stderr
    assert np.array_equal(np.asarray(Image.open("again/0.png")), image)


def test_a_control_of_segments_is_drawn_noted_and_replayed(tmp_path):
    made, control = segment_map(tiny.sd_pipeline())
    made.save_pretrained(tmp_path / "wide")
    control.save_pretrained(tmp_path / "segments")
    words = ("--control", tmp_path / "segments", "--segment", "red circle=0,0,0.5,1")
    image = drawn(tmp_path / "wide", *words)
    other = drawn(tmp_path / "wide", *words[:3], "red circle=0.5,0,1,1", out="other")
    assert not np.array_equal(image, other)
    noted = json.loads(Path("o/run.json").read_text())["record"]["controls"]
    assert [row["class"] for row in noted] == ["SegmentMap"]
    assert noted[0]["image"] is None
    again = run("sample", "--config", "o/run.json", "--out", "again", "--json")
    assert again.exit_code == 0, again.stderr
    assert np.array_equal(np.asarray(Image.open("again/0.png")), image)


def test_a_block_of_a_plan_is_drawn_with_its_controls(model, kit):
    """The plan's folder has what it names, so that others go on with it alone."""
    words = ("--control", f"{kit}/net", "--control", f"{kit}/adapter={kit}/image.png@0.7")
    words += ("--map", kit / "map.png", "--labels", kit / "source.json")
    image = drawn(model, *words)
    named = ("--model", model, "--prompt", PROMPT, "--steps", 2)
    done = run("sample", *named, *words, "--count", 2, "--block", 1, "--out", "b", "--json")
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert np.array_equal(np.asarray(Image.open("b/00000/00000000.png")), image)
    shutil.rmtree("b/00000")
    done = run("sample", "--plan", "b", "--json")
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert np.array_equal(np.asarray(Image.open("b/00000/00000000.png")), image)


def test_a_control_is_that_of_the_pipeline(model, kit):
    image = drawn(model, "--control", f"{kit}/net={kit}/image.png", "--cfg", 5)
    pipe = StableDiffusionControlNetPipeline.from_pretrained(
        model, controlnet=control_net(tiny.sd_pipeline()), safety_checker=None
    )
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        PROMPT,
        image=Image.open(kit / "image.png"),
        num_inference_steps=2,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert np.array_equal(image, np.asarray(expected))


def test_a_map_through_an_affinity_is_the_map_in_the_sources_colours(model, kit, affinity):
    """Training-free transfer: what the control sees is grass above and sea below."""
    image = drawn(model, "--control", f"{kit}/net", "--map", kit / "map.png", "--affinity", "A")
    shown = np.zeros((32, 32, 3), np.uint8)
    shown[:16], shown[16:] = (0, 255, 0), (0, 255, 255)
    Image.fromarray(shown).save("shown.png")
    expected = drawn(model, "--control", f"{kit}/net=shown.png", out="expected")
    assert np.array_equal(image, expected)
    again = run("sample", "--config", "o/run.json", "--out", "again", "--json")
    assert again.exit_code == 0, again.stderr
    assert np.array_equal(np.asarray(Image.open("again/0.png")), image)


def test_apply_rewrites_maps_for_other_programs(kit, affinity):
    maps = affinity.parent / "maps"
    maps.mkdir()
    Image.open(kit / "map.png").save(maps / "7.png")
    void = IDS.copy()
    void[0, 0] = 255
    Image.fromarray(void).save(maps / "8.png")
    assert run("affinity", "A", "--apply", "maps", "--out", "B").exit_code == 0
    assert np.array_equal(np.asarray(Image.open("B/7.png")), np.where(IDS == 0, 1, 2))
    assert np.asarray(Image.open("B/8.png"))[0, 0] == 255
    assert run("affinity", "A", "--apply", "maps", "--out", "C", "--coloured").exit_code == 0
    assert Image.open("C/7.png").getpixel((0, 0)) == (0, 255, 0)


def estimated(*args, out):
    result = run("affinity", "shots", *args, "--out", out, "--json")
    assert result.exit_code == 0, (result.stderr, result.exception)
    return json.loads(result.stdout)["votes"]


def test_apply_is_all_or_nothing(model, kit, affinity):
    """A map that cannot be rewritten, because the source has no number for void, or at all."""
    maps, void = affinity.parent / "maps", IDS.copy()
    maps.mkdir()
    void[0, 0] = 255
    Image.open(kit / "map.png").save(maps / "1.png")
    Image.fromarray(void).save(maps / "2.png")
    (affinity.parent / "source.json").write_text(json.dumps(SETS["source"] | {"void": []}))
    words = ("--source", "source.json", "--hand", "hand.json")
    estimated(*words, out="V")
    fails(run("affinity", "V", "--apply", "maps", "--out", "B"), "void pixels")
    fails(run("affinity", "shots", *words, "--apply", "maps", "--out", "B"), "void pixels")
    fails(
        sample(model, "--control", kit / "net", "--map", maps / "2.png", "--affinity", "V"), "void"
    )
    Image.open(kit / "map.png").save(maps / "1.tif")
    fails(run("affinity", "V", "--apply", "maps", "--out", "B"), "two label maps called 1; rename")
    (maps / "1.tif").unlink()
    Image.open(kit / "unknown.png").save(maps / "2.png")
    words = (*words, "--segmenter", "nowhere")  # which is asked only after the maps were read
    fails(run("affinity", "shots", *words, "--apply", "maps", "--out", "B"), "hold 5, 6; label")
    fails(run("affinity", "shots", *words, "--apply", "empty", "--out", "B"), "has no label maps")
    assert not {"B", "o"} & {path.name for path in affinity.parent.iterdir()}


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    """A folder of transformers that calls every pixel sea, in an order of its own."""
    folder = tmp_path_factory.mktemp("segformer")
    names = ["Sea; water", "background", "sky", "grass, lawn"]
    return write_segformer(folder, names, logits=[3.0, 2.0, 1.0, 0.0])


def test_every_estimate_and_its_files(model, kit, affinity, segmenter):
    write_shots(kit, affinity.parent / "theirs", "source")
    words = ("--source", kit / "source.json", "--segmenter", segmenter, "--text", model)
    words += ("--features", model, "--source-shots", "theirs")
    votes = estimated(*words, out="E")
    assert {frozenset(vote["named"]) for vote in votes.values()} == {
        frozenset(("segmentation", "features", "text"))
    }
    # The segmenter's names are the set's in another order, and before a comma.
    assert [votes[name]["named"]["segmentation"] for name in ("lawn", "lake")] == ["sea"] * 2
    assert [votes[name]["named"]["features"] for name in ("lawn", "lake")] == ["sky", "grass"]
    tensors = load_file("E/affinity.safetensors")
    assert {name for name in tensors if "." not in name} == {"segmentation", "features", "text"}
    sheet = Image.open("E/affinity.png")  # a cell of 11 pixels for two classes a side and three
    assert sheet.size == (150 + 11 * 2, 150 + 11 * 3)
    assert len(sheet.crop((150, 150, *sheet.size)).getcolors()) > 2


def test_the_first_estimate_decides_where_no_two_agree(model, kit, affinity, segmenter):
    write_shots(kit, affinity.parent / "theirs", "source")
    words = ("--source", kit / "source.json", "--segmenter", segmenter, "--features", model)
    words += ("--source-shots", "theirs")
    for first, to in ((), ["sea"] * 2), (("--first", "features"), ["sky", "grass"]):
        votes = estimated(*words, *first, out=f"E{len(first)}")
        assert [votes[name]["to"] for name in ("lawn", "lake")] == to
        assert {vote["how"] for vote in votes.values()} == {"ordered"}
    kept = json.loads(Path("E2/affinity.json").read_text())["order"]
    assert kept == ["features", "segmentation", "text"]


def test_a_segmenters_classes_go_by_their_place_where_no_name_is_known(kit, affinity, segmenter):
    Path("three.json").write_text('{"classes": ["mer", "ciel", "herbe"]}')
    words = ("--segmenter", segmenter, "--source")
    votes = estimated(*words, "three.json", out="E")
    assert [votes[name]["to"] for name in ("lawn", "lake")] == ["mer"] * 2
    unknown = run("affinity", "shots", *words, kit / "target.json", "--out", "F")
    fails(unknown, "the segmenter knows none of the classes of 'target' by name")


def test_a_segmenter_that_knows_few_classes_is_told_of(kit, affinity, segmenter):
    Path("part.json").write_text('{"classes": ["sea", "ice", "snow"]}')
    words = ("--source", "part.json", "--segmenter", segmenter, "--out")
    assert run("affinity", "shots", *words, "Q", "--quiet").output == ""
    result = run("affinity", "shots", *words, "E")
    assert result.exit_code == 0
    told = "warning: the segmenter knows 1 of the 3 classes of 'part' by name, and never names the"
    assert result.stderr.startswith(told)
    assert result.stderr.splitlines() == [f"{told} others: ice, snow"]


def test_a_segmenter_with_its_label_set_beside_it_is_a_source(kit, affinity, tmp_path):
    folder = write_segformer(tmp_path / "own", ["background", "sky", "sea"], logits=[0.0, 1.0, 2.0])
    (folder / "labels.json").write_text('{"classes": ["sky", "sea"]}')
    votes = estimated("--source", folder, "--by", "segmentation,", out="E")
    assert [votes[name]["to"] for name in ("lawn", "lake")] == ["sea"] * 2


def test_the_vote_alone_is_all_that_has_a_model(model, kit, affinity):
    words = ("--source", kit / "source.json", "--text", model)
    votes = estimated(*words, "--by", "vote", out="E")
    assert all(list(vote["named"]) == ["text"] for vote in votes.values())
    assert votes == estimated(*words, out="F")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("net", ("net", None, 1.0, 0.0, 1.0, False)),
        ("net@0.5", ("net", None, 0.5, 0.0, 1.0, False)),
        ("net@0.5:0.2-0.8", ("net", None, 0.5, 0.2, 0.8, False)),
        ("owner/name:0-0.5:guess", ("owner/name", None, 1.0, 0.0, 0.5, True)),
        ("a=b@1/net=x.png", ("a=b@1/net", "x", 1.0, 0.0, 1.0, False)),
        ("net=a@2.png@0.3:guess", ("net", "a", 0.3, 0.0, 1.0, True)),
    ],
)
def test_controls_as_text(text, expected):
    for name in ("x.png", "a@2.png"):
        Image.new("RGB", (4, 4)).save(name)
    found = parse_control(text)
    own = (found.model, found.image, found.scale, found.start, found.stop, found.guess)
    assert own[0] == expected[0]
    assert own[2:] == expected[2:]
    assert (own[1] is None) == (expected[1] is None)


def fails(result, *texts):
    assert result.exit_code == 2, (result.output, result.exception)
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for text in texts:
        assert text in result.stderr


@pytest.mark.parametrize(
    "args, text",
    [
        (["--control", "{kit}/pickle={kit}/image.png"], "python -c"),
        (["--control", "{kit}/xl={kit}/image.png"], "ControlNet for another model"),
        (["--control", "{kit}/net={kit}/wide.png"], "64x32, of another shape than 32x32"),
        (["--control", "{kit}/net=nowhere.png"], "no such file"),
        (["--control", "{kit}/net"], "no image and its condition no map"),
        (["--control", "{kit}/net={kit}/image.png@x"], "no number"),
        (
            ["--control", "{kit}/wide", "--map", "{kit}/map.png", "--labels", "{kit}/target.json"],
            "reads 5 channels, one for a class, and label set 'target' has 2 classes; give it",
        ),
        (["--control", "{kit}/net={kit}/image.png:0.9-0.1"], "0 <= start < stop <= 1"),
        (["--map", "{kit}/map.png"], "--map needs the label set"),
        (["--map", "{kit}/map.png", "--labels", "{kit}/target.json"], "nothing here reads a label"),
        (["--labels", "ade20k-150"], "give --map"),
        (["--map", "{kit}/unknown.png", "--labels", "{kit}/target.json"], "hold 5, 6; label set"),
        (["--map", "{kit}/colours.png", "--labels", "{kit}/target.json"], "#123456"),
        (["--map", "{kit}/map.jpg", "--labels", "{kit}/target.json"], "is a JPEG"),
        (["--map", "{kit}/map.png", "--labels", "coco"], "one of ade20k-150, coco-stuff-182"),
        (["--map", "{kit}/map.png", "--affinity", "{kit}"], "is no affinity"),
        (
            [*CLASSES, "--labels", "{kit}/target.json"],
            "2 classes (lawn, lake), and the control reads 'labels' with 2 (sky, sea); give a map",
        ),
        (
            [*CLASSES, "--affinity", "A"],
            "of label set 'source' with 3 classes (sky, grass, sea), and the control reads",
        ),
        (
            ["--map", "{kit}/map.png", "--affinity", "A", "--labels", "{kit}/source.json"],
            "is of label set 'source', and this affinity is for 'shots'",
        ),
    ],
)
def test_bad_input_is_one_line(model, kit, affinity, args, text):
    fails(sample(model, *(arg.format(kit=kit) for arg in args)), text)
    assert not (affinity.parent / "o").exists()


@pytest.mark.parametrize(
    "args, text",
    [
        (["nowhere", "--source", "ade20k-150"], "nowhere is no folder"),
        (["shots"], "--source says what to map to: one of ade20k-150"),
        (["shots", "--source", "ade20k-150"], "nothing to estimate from"),
        (["shots", "--source", "{kit}/net"], "does not say which classes its maps hold"),
        (["shots", "--source", "ade20k-150", "--by", "text"], "--by text needs --text"),
        (["shots", "--source", "ade20k-150", "--by", "x"], "there are segmentation, features"),
        (["shots", "--source", "ade20k-150", "--hand", "hand.json"], "has no class 'bad'"),
        (["shots", "--source", "ade20k-150", "--text", "RN50/nothing"], "RN50; there are openai"),
        (["shots", "--source", "ade20k-150", "--by", "vote"], "nothing to estimate from"),
        (["shots", "--source", "ade20k-150", "--by", ","], "no estimate ''; there are segment"),
        (["shots", "--source", "scenes", "--segmenter", "scenes"], "no segmenter 'scenes'"),
        (["shots", "--source", "scenes-maps", "--by", "segmentation"], "give one of its classes"),
        (
            ["shots", "--source", "ade20k-150", *SILENT, "--site", "x"],
            "estimate by features, which",
        ),
        (["shots", "--source", "ade20k-150", *SILENT, "--by", "segmentation"], "by text, which is"),
        (["shots", "--source", "ade20k-150", *SILENT, "--coloured"], "give --apply"),
        (["shots", "--source", "ade20k-150", *SILENT, "--first", "features"], "give --features"),
        (["shots", "--source", "ade20k-150", "--first", "vote"], "'vote' is not one of"),
        (
            ["shots", "--source", "ade20k-150", *SILENT, "--by", "vote", "--first", "features"],
            "not asked for; give --features",
        ),
        (
            ["shots", "--source", "ade20k-150", *SILENT[:2], "--first", "text"],
            "there is one; ask for more",
        ),
        (["A", "--apply", "{kit}", "--first", "text"], "--first is for an estimate"),
        (["A", "--apply", "{kit}", "--by", "text"], "--by is for an estimate, and the affinity is"),
        (["A", "--apply", "{kit}", "--hand", "hand.json"], "--hand is for an estimate"),
        (["A"], "give --apply"),
        (["A", "--apply", "nowhere"], "has no label maps"),
    ],
)
def test_bad_affinities_are_one_line(kit, affinity, args, text):
    (affinity.parent / "hand.json").write_text('{"lawn": "bad"}')
    fails(run("affinity", *(arg.format(kit=kit) for arg in args), "--out", "B"), text)
    assert not (affinity.parent / "B").exists()
