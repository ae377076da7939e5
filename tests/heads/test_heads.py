"""Heads: labelled images as people have them, features, fitting, files that refuse strangers."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image, ImageOps
from safetensors.torch import load_file

from guidekit import Denoiser
from guidekit.heads import Examples, FitOptions, Reading, fit, load_head, read_examples
from guidekit.heads.data import class_map, read_mask, soft_masks
from guidekit.heads.features import (
    collect,
    fixed_noise,
    noised,
    observe,
    pooled,
    read_features,
    resolve_sites,
)
from guidekit.heads.fingerprint import fingerprint, same_backbone
from guidekit.heads.head import Head, HeadConfig
from guidekit.heads.linear import fit_linear, log_loss
from guidekit.heads.pixels import varied
from guidekit.testing.miniatures import ddpm_pipeline, sd_pipeline

SIZE = (16, 16)


@pytest.fixture(scope="module")
def denoiser():
    return Denoiser(ddpm_pipeline())


def picture(path, value=128, size=(16, 16), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode != "RGB" else (value, value // 2, 255 - value)).save(path)


def bright_and_dark(count=12, side=16):
    """Images of two classes that differ in their left half, and which half is bright."""
    generator = torch.Generator().manual_seed(0)
    pictures = 0.3 * torch.randn(count, 3, side, side, generator=generator)
    targets = torch.arange(count) % 2
    for i, target in enumerate(targets):
        half = slice(0, side // 2) if target else slice(side // 2, side)
        pictures[i, :, :, half] += 0.7
    return pictures.clamp(-1, 1), targets


def halves(count=8, side=16):
    """Images whose left part is bright up to some column, and that part as a mask."""
    generator = torch.Generator().manual_seed(1)
    pictures = 0.2 * torch.randn(count, 3, side, side, generator=generator) - 0.4
    masks = torch.zeros(count, side, side, dtype=torch.long)
    for i in range(count):
        edge = 4 + i % 8
        pictures[i, :, :, :edge] += 0.8
        masks[i, :, :edge] = 1
    return pictures.clamp(-1, 1), masks


# Data


def test_class_folders_and_an_attribute(tmp_path):
    for name, count in (("positive", 3), ("negative", 2)):
        for i in range(count):
            picture(tmp_path / name / f"{i}.png")
    found = read_examples(tmp_path, SIZE)
    assert found.kind == "classes"
    assert found.classes == ("negative", "positive")
    assert found.per_class == {"negative": 2, "positive": 3}
    assert found.load([0, 4]).shape == (2, 3, 16, 16)


def test_pictures_are_cut_in_the_middle_and_resized(tmp_path):
    picture(tmp_path / "a" / "1.png", 255, (64, 32), "L")
    picture(tmp_path / "b" / "1.png", 0, (8, 8), "L")
    found = read_examples(tmp_path, SIZE, channels=1)
    assert torch.equal(found.load([0, 1]).mean((1, 2, 3)), torch.tensor([1.0, -1.0]))


def test_masks_by_stem_with_names_and_free_pixels(tmp_path):
    for stem in ("x", "y"):
        picture(tmp_path / "images" / f"{stem}.jpg")
        values = np.zeros((16, 16), np.uint8)
        values[:, 8:], values[0] = 3, 255
        mask = Image.fromarray(values).convert("P")
        (tmp_path / "masks").mkdir(exist_ok=True)
        mask.putdata(values.flatten().tolist())
        mask.save(tmp_path / "masks" / f"{stem}.png")
    (tmp_path / "classes.txt").write_text("sky\nsea\nland\nsun\n")
    found = read_examples(tmp_path, SIZE)
    assert found.classes == ("sky", "sun")
    assert found.values == (0, 3)
    mask = found.masks(1)
    assert (mask[0] == -1).all()
    assert mask[1, 0] == 0
    assert mask[1, 15] == 1
    soft = soft_masks(mask[None], 2, (4, 4))
    assert float(soft[0, 0, 0, 0]) == 0.75
    assert float(soft[0, 1, 0, 0]) == 0


@pytest.mark.parametrize("name", ["labels.csv", "metadata.jsonl"])
def test_tables_with_several_labels(tmp_path, name):
    sets = [["hat", "smile"], ["hat"], ["smile"]]
    for i in range(3):
        picture(tmp_path / f"{i}.png")
    if name.endswith("csv"):
        lines = ["file_name,label"] + [f"{i}.png,{';'.join(s)}" for i, s in enumerate(sets)]
    else:
        lines = [json.dumps({"file_name": f"{i}.png", "label": s}) for i, s in enumerate(sets)]
    (tmp_path / name).write_text("\n".join(lines))
    found = read_examples(tmp_path, SIZE)
    assert found.kind == "labels"
    assert found.classes == ("hat", "smile")
    assert found.targets.tolist() == [[1, 1], [1, 0], [0, 1]]


def test_a_table_with_a_column_per_label(tmp_path):
    for i in range(2):
        picture(tmp_path / f"{i}.png")
    (tmp_path / "a.csv").write_text("file,hat,smile\n0.png,1,-1\n1.png,0,1\n")
    found = read_examples(tmp_path / "a.csv", SIZE)
    assert found.kind == "labels"
    assert found.targets.tolist() == [[1, 0], [0, 1]]


CATS = {
    "mark in front": ("\ufefffile_name,label\n0.png,cat\n1.png,dog\n", ("cat", "dog")),
    "semicolons": ("file_name;label\n0.png;cat\n1.png;dog\n", ("cat", "dog")),
    "tabs": ("file_name\tlabel\n0.png\tcat\n1.png\tdog\n", ("cat", "dog")),
    "line breaks": ('file_name,label\r\n0.png,"big\n cat"\r\n1.png,dog\r\n', ("big cat", "dog")),
    "commas in quotes": ('file_name,label\n0.png,"cat, big"\n1.png,dog\n', ("cat, big", "dog")),
    "numbers": ("file_name,label\n0.png,10\n1.png,9\n", ("9", "10")),
    "fractions": ("file_name,smile,hat\n0.png,1.0,0.0\n1.png,0,True\n", ("smile", "hat")),
}


@pytest.mark.parametrize("name", CATS)
def test_tables_as_spreadsheets_write_them(tmp_path, name):
    for i in range(2):
        picture(tmp_path / f"{i}.png")
    text, classes = CATS[name]
    (tmp_path / "a.csv").write_bytes(text.encode())
    found = read_examples(tmp_path / "a.csv", SIZE)
    assert found.classes == classes
    assert found.per_class == dict.fromkeys(classes, 1)


def test_json_lines_hold_any_letter(tmp_path):
    """Marks that end a line elsewhere, and one in front of the file."""
    for i in range(2):
        picture(tmp_path / f"{i}.png")
    names = ["a\u2028b\x85c", "d\ne"]
    rows = [{"file_name": f"{i}.png", "label": [n]} for i, n in enumerate(names)]
    text = "\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "metadata.jsonl").write_bytes(text.encode())
    assert read_examples(tmp_path, SIZE).classes == ("a b c", "d e")


def test_a_table_without_files_says_its_columns(tmp_path):
    (tmp_path / "a.csv").write_text("name,label\n0.png,cat\n")
    with pytest.raises(ValueError, match="no column file_name, .*; it has name, label"):
        read_examples(tmp_path / "a.csv", SIZE)


def test_class_folders_are_sorted_by_number(tmp_path):
    for name in ("10", "9", "1"):
        picture(tmp_path / name / "1.png")
    assert read_examples(tmp_path, SIZE).classes == ("1", "9", "10")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_lie_on_what_a_viewer_shows(tmp_path, orientation):
    """Stored in any orientation, cut and resized alike."""
    colours = np.random.default_rng(0).integers(0, 2, (20, 33), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    stored = Image.fromarray(255 * colours)
    stored.save(tmp_path / "images/a.png", exif=exif)
    ImageOps.exif_transpose(Image.open(tmp_path / "images/a.png")).point(
        lambda v: 3 * (v > 0)
    ).save(tmp_path / "masks/a.png")
    found = read_examples(tmp_path, (20, 20))
    assert torch.equal(found.pictures(0)[0] > 0, found.masks(0) == 1)
    assert found.values == (0, 3)


@pytest.mark.parametrize("mode", ["L", "1", "I;16", "I;16B", "I", "P", "LA", "RGB", "RGBA"])
def test_masks_of_classes_in_every_depth(tmp_path, mode):
    values = np.random.default_rng(0).integers(0, 2, (16, 16))
    high = 300 if mode.startswith("I") else 1
    deep = (values * high).astype(np.uint16)
    image = {
        "I;16B": lambda: Image.frombytes("I;16B", (16, 16), deep.astype(">u2").tobytes()),
        "I;16": lambda: Image.fromarray(deep),
        "I": lambda: Image.fromarray(deep.astype(np.int32)),
        "1": lambda: Image.fromarray(values > 0),
        "P": lambda: Image.fromarray(values.astype(np.uint8), "P"),
    }.get(mode, lambda: Image.fromarray(values.astype(np.uint8)).convert(mode))()
    if mode == "P":
        image.putpalette([9, 9, 9, 255, 0, 0])
    path = tmp_path / "a.tif"
    image.save(path)
    assert np.array_equal(read_mask(path), values * high)


def _unlabelled(folder):
    picture(folder / "1.png")


def _one_class(folder):
    picture(folder / "cat" / "1.png")


def _empty_class(folder):
    picture(folder / "cat" / "1.png")
    (folder / "dog").mkdir()


def _lonely(folder):
    picture(folder / "images" / "1.png")
    picture(folder / "masks" / "2.png", mode="L")


def _other_size(folder):
    picture(folder / "images" / "1.png")
    picture(folder / "masks" / "1.png", 1, (8, 8), "L")


def _coloured(folder):
    picture(folder / "images" / "1.png")
    picture(folder / "masks" / "1.png")


def _jpeg_mask(folder):
    picture(folder / "images" / "1.png")
    picture(folder / "masks" / "1.jpg", mode="L")


def _corrupt(folder):
    picture(folder / "cat" / "1.png")
    (folder / "dog").mkdir()
    (folder / "dog" / "1.png").write_bytes(b"no image")


def _missing(folder):
    (folder / "labels.csv").write_text("file_name,label\n1.png,cat\n")


def _no_labels(folder):
    picture(folder / "1.png")
    (folder / "labels.csv").write_text("file_name,label\n1.png,\n")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: None, "is empty"),
        (_unlabelled, "have no labels"),
        (_one_class, "one class only"),
        (_empty_class, "dog has no images"),
        (_lonely, "lack image or mask"),
        (_other_size, "they must be the same"),
        (_coloured, "is in colour"),
        (_jpeg_mask, "is a JPEG, which changes the values; save it as an indexed PNG"),
        (_corrupt, "not a readable image"),
        (_missing, "do not exist"),
        (_no_labels, "no label"),
    ],
)
def test_bad_examples_say_what_is_wrong(tmp_path, make, says):
    make(tmp_path)
    with pytest.raises(ValueError, match=says):
        read_examples(tmp_path, SIZE)


# Features


def test_features_are_those_of_a_whole_call(denoiser):
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    sites = ("down_blocks.0", "mid_block", "up_blocks.1.resnets.0")
    kept = {}
    hooks = [
        denoiser.model.get_submodule(s).register_forward_hook(
            lambda m, a, out, s=s: kept.__setitem__(s, out[0] if isinstance(out, tuple) else out)
        )
        for s in sites
    ]
    denoiser.model(x, 300)
    for hook in hooks:
        hook.remove()
    found = read_features(denoiser, x, 300, sites)
    assert all(torch.equal(found[s], kept[s]) for s in sites)


def test_noise_is_the_schedulers(denoiser):
    x, eps = torch.randn(2, 3, 16, 16), fixed_noise([0, 1], (3, 16, 16))
    expected = denoiser.pipeline.scheduler.add_noise(x, eps, torch.tensor([250, 250]))
    torch.testing.assert_close(noised(denoiser, x, 250, eps), expected)


def test_the_cache_streams_and_is_used_again(denoiser, tmp_path):
    pictures, _ = bright_and_dark(5)
    reading, asked = Reading(("mid_block",), (500,), pool=2), []

    def load(index):
        asked.append(list(index))
        return pictures[list(index)]

    first = collect(denoiser, load, 5, reading, tmp_path, "key", batch=2)
    assert asked == [[0, 1], [2, 3], [4]]
    again = collect(denoiser, load, 5, reading, tmp_path, "key", batch=2)
    assert len(asked) == 3
    assert np.array_equal(first["500.mid_block"], again["500.mid_block"])
    (maps,) = observe(denoiser, pictures, reading)
    expected = pooled(maps, ["mid_block"], 2).detach().numpy()
    np.testing.assert_allclose(first["500.mid_block"], expected, rtol=1e-4, atol=1e-5)
    assert isinstance(first["500.mid_block"], np.memmap)


def test_sites_that_match_nothing_are_refused(denoiser):
    with pytest.raises(ValueError, match="nowhere"):
        resolve_sites(denoiser, ["nowhere"], "classes")


# Linear heads


def test_ridge_solves_the_normal_equations():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6)), np.arange(40) % 2
    x[:, 0] += 2 * y
    found = fit_linear(x, y, 2, "ridge")
    z = (x - found.mean) / found.std
    target = 4 * (2.0 * (y[:, None] == np.arange(2)) - 1)
    centred = z - z.mean(0)
    gram = centred.T @ centred + found.strength * np.eye(6)
    np.testing.assert_allclose(found.weight, np.linalg.solve(gram, centred.T @ target).T)


def test_strength_and_temperature_are_cross_validated():
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = rng.normal(size=(60, 30))
    x[:, :3] += 2.5 * np.eye(3)[y]
    found = fit_linear(x, y, 3)
    test = rng.normal(size=(600, 30))
    labels = np.arange(600) % 3
    test[:, :3] += 2.5 * np.eye(3)[labels]
    logits = found.logits(test)
    assert (logits.argmax(1) == labels).mean() > 0.75
    calibrated = log_loss(logits, labels)
    assert calibrated < log_loss(4 * logits, labels)
    assert calibrated < log_loss(logits / 4, labels)
    assert found.scores["folds"] == 5


def test_rows_of_a_fold_that_is_left_out_are_not_scored():
    """Class 2 is in one image alone, so that image cannot be held out."""
    rng = np.random.default_rng(0)
    groups, y = np.repeat(np.arange(5), 100), np.zeros(500, int)
    y[::2] = 1
    y[groups == 0] = 2
    x = rng.normal(size=(500, 4))
    x[:, 0] += 6 * (y == 1)
    x[:, 1] += 6 * (y == 2)
    found = fit_linear(x, y, 3, groups=groups)
    assert found.scores["folds"] == 4
    assert found.scores["rows"] == 400
    assert found.scores["accuracy"] > 0.99
    assert found.scores["log_loss"] < 0.05


def test_one_example_of_a_class_has_the_defaults():
    x = np.random.default_rng(0).normal(size=(3, 8))
    found = fit_linear(x, np.arange(3), 3)
    assert found.scores == {}
    assert found.temperature == 1
    assert found.strength == 0.01
    assert (found.logits(x).argmax(1) == np.arange(3)).all()


def test_rare_classes_weigh_as_much_as_frequent_ones():
    rng = np.random.default_rng(0)
    y = np.array([0] * 90 + [1] * 10)
    x = rng.normal(size=(100, 2)) + 1.2 * y[:, None]
    logits = fit_linear(x, y, 2).logits(x)
    assert (
        abs((logits.argmax(1) == 1)[y == 1].mean() - (logits.argmax(1) == 0)[y == 0].mean()) < 0.3
    )


# Fitting and files


def test_classes_are_learned_and_saved(denoiser, tmp_path):
    pictures, targets = bright_and_dark()
    head, report = fit(denoiser, Examples.of(pictures, targets, ["right", "left"]))
    assert report.scores["accuracy"] > 0.9
    assert report.notes == []
    assert (head.predict(denoiser, pictures).argmax(1) == targets).all()
    again = load_head(head.save(tmp_path / "head"), denoiser)
    assert again.config == head.config
    assert torch.equal(again.predict(denoiser, pictures), head.predict(denoiser, pictures))
    alone = again.predict(denoiser, pictures[3:4])
    torch.testing.assert_close(alone, head.predict(denoiser, pictures)[3:4], atol=1e-4, rtol=1e-4)


def test_noised_features_have_a_readout_for_each_timestep(denoiser):
    pictures, targets = bright_and_dark()
    options = FitOptions(noised=True, timesteps=(100, 300))
    head, _ = fit(denoiser, Examples.of(pictures, targets, ["right", "left"]), options)
    assert len(head.readouts) == 2
    maps = read_features(denoiser, pictures, 290, head.config.reading.sites)
    expected = head.readouts[1](head.assembled([maps]))[..., 0, 0]
    assert torch.equal(head.at_timestep(maps, 290), expected)


def test_several_labels_are_learned(denoiser):
    pictures, targets = bright_and_dark(16)
    other = torch.arange(16) // 2 % 2
    pictures[other == 1, 0] -= 0.8
    both = torch.stack([targets, other], 1).numpy()
    head, report = fit(denoiser, Examples.of(pictures, both, ["left", "less red"], "labels"))
    assert ((head.predict(denoiser, pictures) > 0).numpy() == both).mean() > 0.9
    assert report.scores["folds"] == 5
    both[:, 1] = 1
    with pytest.raises(ValueError, match="'less red' is on every image"):
        fit(denoiser, Examples.of(pictures, both, ["left", "less red"], "labels"))


@pytest.mark.parametrize("estimator", ["mlp", "linear"])
def test_masks_are_learned(denoiser, estimator):
    pictures, masks = halves()
    examples = Examples.of(pictures, masks, ["dark", "bright"], "masks")
    options = FitOptions(estimator=estimator, epochs=30, copies=2)
    head, report = fit(denoiser, examples, options)
    found = head.predict(denoiser, pictures)
    assert found.shape == (8, 2, 16, 16)
    assert (found.argmax(1) == masks).float().mean() > 0.85
    assert (head.config.hidden == (64, 64, 64)) == (estimator == "mlp")
    assert max(report.scores.get("held_out_miou", 0), report.scores.get("accuracy", 0)) > 0.6


def test_variants_keep_picture_and_mask_together():
    pictures, masks = halves(1)
    same, mask = varied(pictures[0], masks[0], 0)
    assert torch.equal(same, pictures[0])
    assert torch.equal(mask, masks[0])
    flipped, mask = varied(pictures[0], masks[0], 1)
    assert torch.equal(mask, masks[0].flip(-1))
    assert float(flipped[:, mask == 1].mean()) > float(flipped[:, mask == 0].mean())


def test_auto_chooses_and_shows_what_it_tried(denoiser):
    pictures, targets = bright_and_dark()
    options = FitOptions(auto=True, sites=("down_blocks.0", "mid_block"), timesteps=(100,), pool=2)
    _, report = fit(denoiser, Examples.of(pictures, targets, ["right", "left"]), options)
    assert len(report.candidates) == 3  # each site, and both
    assert report.reading == report.candidates[0].reading
    losses = [c.log_loss for c in report.candidates]
    assert losses == sorted(losses)


def test_one_example_per_class_says_so(denoiser):
    pictures, targets = bright_and_dark(2)
    examples = Examples.of(pictures, targets, ["right", "left"])
    _, report = fit(denoiser, examples)
    assert "one example only" in report.notes[0]
    assert report.scores == {}
    with pytest.raises(ValueError, match="--auto needs two"):
        fit(denoiser, examples, FitOptions(auto=True))


def small_head(denoiser):
    pictures, targets = bright_and_dark(4)
    return fit(denoiser, Examples.of(pictures, targets, ["right", "left"]))[0]


def test_a_head_refuses_another_backbone_but_not_another_precision(denoiser, tmp_path):
    folder = small_head(denoiser).save(tmp_path)
    load_head(folder, Denoiser(ddpm_pipeline().to(torch.float16)))
    with pytest.raises(ValueError, match="another backbone"):
        load_head(folder, Denoiser(sd_pipeline()))
    other = ddpm_pipeline()
    for weight in other.unet.parameters():
        weight.data += 0.05
    with pytest.raises(ValueError, match="other weights"):
        load_head(folder, Denoiser(other))


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_fingerprint_sees_all_weights_and_no_rounding(dtype):
    pipe = ddpm_pipeline()
    own, model = fingerprint(Denoiser(pipe)), pipe.unet
    whole = {k: v.clone() for k, v in model.state_dict().items()}
    halved = fingerprint(Denoiser(ddpm_pipeline().to(dtype)))
    assert same_backbone(own, halved)
    assert own["dtype"] != halved["dtype"]
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.data += torch.randn_like(weight) * 1e-3
    assert not same_backbone(fingerprint(Denoiser(pipe)), halved)
    for name in whole:  # each of them alone
        model.load_state_dict(whole)
        dict(model.named_parameters())[name].data.mul_(1.05).add_(0.01)
        assert not same_backbone(fingerprint(Denoiser(pipe)), halved), name
    model.load_state_dict(whole)
    pipe.scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    other = fingerprint(Denoiser(pipe))
    assert same_backbone(own, other)
    assert not same_backbone(own, other, levels=True)
    for numbers in (None, [], "x", [[0.0]], own["sums"][1:], ["a"] * len(own["sums"])):
        assert not same_backbone(own, own | {"sums": numbers})


def test_the_fingerprint_of_a_model_that_reads_text_has_its_encoder():
    pipe = sd_pipeline()
    own = fingerprint(Denoiser(pipe))
    for weight in pipe.text_encoder.parameters():
        weight.data += 0.05
    assert not same_backbone(own, fingerprint(Denoiser(pipe)))


def test_a_head_refuses_other_sites_and_damage(denoiser, tmp_path):
    head = small_head(denoiser)
    reading = dataclasses.replace(head.config.reading, sites=("nowhere",))
    other = Head(dataclasses.replace(head.config, reading=reading))
    with pytest.raises(ValueError, match="nowhere"):
        load_head(other.save(tmp_path / "sites"), denoiser)
    with pytest.raises(ValueError, match="is no head"):
        load_head(tmp_path / "none", denoiser)
    folder = head.save(tmp_path / "cut")
    (folder / "head.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="damaged"):
        load_head(folder, denoiser)
    assert set(load_file(tmp_path / "sites" / "head.safetensors")) == set(head.state_dict())


@pytest.mark.parametrize("kind", ["picture", ""])
def test_a_head_of_an_unknown_kind_is_refused(kind):
    with pytest.raises(ValueError, match="no kind of head"):
        Head(HeadConfig(kind, ("a",), Reading(("mid_block",), (5,)), 4))


def test_class_map_marks_unknown_values():
    values = np.array([[7, 9], [9, 3]])
    assert class_map(values, (7, 9), (2, 2)).tolist() == [[0, 1], [1, -1]]
