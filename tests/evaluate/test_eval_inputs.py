"""What `guidekit eval` reads: folders and tars, label maps of every data set, damaged files."""

import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from guidekit.errors import GuidekitError
from guidekit.evaluate.images import prompts_of, read_images
from guidekit.evaluate.judges import load_segmenter
from guidekit.evaluate.label_maps import chosen, read_label_maps
from panoptic import write_maskformer
from plans import run
from scene_files import N


def test_maps_of_every_data_set_have_one_numbering(tmp_path):
    def written(name, values, form):
        folder = tmp_path / form
        folder.mkdir()
        Image.fromarray(np.array(values, np.uint8)).save(folder / f"{name}.png")
        maps = read_label_maps(str(folder), form)
        return maps.keys, maps.map(maps.keys[0]).tolist(), maps.classes

    assert written("000000000139", [[0, 181], [255, 3]], "coco-stuff") == (
        ["139"], [[1, 182], [0, 4]], 182,
    )  # fmt: skip
    assert written("ADE_val_1", [[0, 1], [150, 2]], "ade20k") == (
        ["ADE_val_1"], [[0, 1], [150, 2]], 150,
    )  # fmt: skip
    assert written("aachen_0_gtFine_labelIds", [[7, 33], [0, 9]], "cityscapes") == (
        ["aachen_0"], [[1, 19], [0, 0]], 19,
    )  # fmt: skip
    place = [{"phrase": "cat", "box": [0, 0, 0.5, 1]}, {"phrase": "ant", "box": [0.5, 0, 1, 1]}]
    (tmp_path / "7.json").write_text(json.dumps({"prompt": "a cat, an ant", "segments": place}))
    maps = read_label_maps(str(tmp_path), "layout")
    assert maps.names == ("ant", "cat")
    assert maps.map("7")[0, [0, -1]].tolist() == [2, 1]


def test_zestguides_protocols():
    wanted = np.zeros((10, 10), int)
    wanted[0, :4], wanted[1:3], wanted[3:5], wanted[5:7] = 1, 2, 3, 4
    assert set(np.unique(chosen(wanted, "all"))) == {0, 1, 2, 3, 4}
    assert set(np.unique(chosen(wanted, "filtered"))) == {0, 2, 3, 4}
    assert chosen(wanted, "few") is not None
    wanted[7:9] = 5
    assert chosen(wanted, "few") is None


def test_folders_are_known_by_their_path_and_not_by_their_name(drawn, tmp_path, monkeypatch):
    folder = tmp_path / "run unguided"  # as the rows of unguided images are called
    shutil.copytree(drawn, folder)
    (wanted,) = json.loads(run("eval", "prompts", drawn, "--json").stdout)["rows"]
    monkeypatch.chdir(folder)
    for name in (folder, "."):
        (row,) = json.loads(run("eval", "prompts", name, "--json").stdout)["rows"]
        assert row["CLIP score"] == wanted["CLIP score"]
        assert row["n"] == N


def test_sheets_of_grids_are_no_images_at_any_depth(drawn, tmp_path):
    grid = tmp_path / "grids" / "first"
    run_folder = grid / "scale=1"
    shutil.copytree(drawn, run_folder)
    (run_folder / "run.json").write_text("{}")
    shutil.copy(next(drawn.glob("*.png")), grid / "sheet.png")
    for folder in (grid, grid.parent):
        assert not any("sheet" in key for key in read_images(folder).keys)


def test_tars_and_folders_are_the_same_images(drawn, tmp_path):
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for file in sorted(drawn.iterdir()):
            tar.add(file, file.name)
    for source in (tmp_path, tmp_path / "00000.tar"):
        images, same = read_images(source), read_images(drawn)
        assert images.keys == same.keys == [str(i) for i in range(N)]
        assert all(images.image(k).tobytes() == same.image(k).tobytes() for k in images.keys)
        assert prompts_of(source) == prompts_of(drawn)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("prompts.jsonl", '{"key": 1}\n', "a line is"),
        ("prompts.jsonl", "[1]\n", "a line is"),
        ("prompts.jsonl", "{\n", "a line is"),
        ("a.txt", b"\xff\xfe", "no text in UTF-8"),
        ("x.tar", "torn", "not a readable tar"),
    ],
)
def test_damaged_prompts_are_refused_in_one_line(tmp_path, name, text, message):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    done = run("eval", "prompts", tmp_path)
    assert done.exit_code == 2, done.stderr
    assert message in done.stderr, done.stderr


@pytest.mark.parametrize(
    "table",
    [[], {}, {"categories": [], "annotations": [{"file_name": "a.png", "segments_info": [{}]}]},
     {"categories": [], "annotations": [{"file_name": "../a.png", "segments_info": []}]}],
)  # fmt: skip
def test_damaged_panoptic_json_is_refused(tmp_path, table):
    (tmp_path / "val.json").write_text(json.dumps(table))
    with pytest.raises(GuidekitError, match="not COCO's panoptic JSON"):
        read_label_maps(str(tmp_path / "val.json"), "panoptic")


def test_segmenters_of_transformers(tmp_path):
    """A OneFormer is told its task in words, which nothing here does."""
    read = load_segmenter(str(write_maskformer(tmp_path / "judge"))).read
    assert read([Image.new("RGB", (32, 24))])[0].shape == (24, 32)
    (tmp_path / "config.json").write_text('{"model_type": "oneformer"}')
    with pytest.raises(GuidekitError, match="'oneformer'; segmenters are mask2former, maskformer"):
        load_segmenter(str(tmp_path))
