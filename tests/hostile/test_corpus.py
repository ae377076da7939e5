"""Every hostile input of the corpus is refused in one line, and does nothing else."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import corpus
from corpus import PATHS, write
from corpus_models import (
    CLIP_FOLDERS,
    ENCODERS,
    NOISY_FOLDERS,
    PIPELINES,
    TOWER_IS_RIGHT,
    copied,
)
from corpus_pictures import PICTURES, encoded
from corpus_shards import SHARDS
from corpus_texts import LAYOUTS, RECIPES, SETTINGS, TABLES
from corpus_weights import HEADS, WEIGHTS
from guidekit.__main__ import main
from guidekit.backbones.loading import load
from guidekit.cli.settings import make_settings, read_config
from guidekit.errors import GuidekitError
from guidekit.heads.data import read_examples
from guidekit.heads.head import load_head
from guidekit.images import read_image
from guidekit.layouts import load_layout
from guidekit.masks import load_mask
from guidekit.noisy_clip.files import load_clip
from guidekit.noisy_clip.model import NoisyClip
from guidekit.references import load_reference, load_references
from guidekit.semantica.data import _decode
from guidekit.semantica.encode import load_encoder, random_encoder
from guidekit.semantica.sources import folder_items, shard_items
from guidekit.system.untrusted import file_name, inside, read_weights
from guidekit.train.recipe import read_recipe


def refused(loader, *args):
    """Loads, which must fail as bad input does, and returns what the command line would print."""
    with pytest.raises((ValueError, OSError)) as caught:
        loader(*args)
    assert not isinstance(caught.value, UnicodeError), "a wrong encoding is no message"
    text = str(caught.value)
    assert text.strip(), text[:200]
    assert len(text) < 2500, text[:200]
    return text


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(inbox, name):
    path = PICTURES[name](inbox)
    for reader in (load_reference, load_mask, lambda p: read_image(p, (8, 8))):
        assert "not a readable image" in refused(reader, path)
    if path.is_file():
        path.rename(inbox / "a.jpg")  # what it is called does not count
        assert [_decode(item, (8, 8)) for item in folder_items(inbox)] == [None]


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(inbox, name):
    path = WEIGHTS[name](inbox)
    assert str(path) in refused(read_weights, path)


@pytest.mark.parametrize("name", HEADS)
def test_heads(inbox, name):
    text = refused(load_head, HEADS[name](inbox))
    assert "fit it again" in text


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(inbox, name):
    assert "recipe" in refused(read_recipe, RECIPES[name](inbox))


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(inbox, name):
    path = SETTINGS[name](inbox)
    refused(lambda: make_settings(read_config(path), {}))


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(inbox, name):
    write(inbox.parent / "x.png", encoded("PNG", mode="L"))  # what ../x.png would reach
    text = refused(load_layout, LAYOUTS[name](inbox))
    assert ("leads out of" in text) == any(repr(path) in name for path in (*PATHS, "", "\0"))
    (inbox.parent / "x.png").unlink()


@pytest.mark.parametrize("name", TABLES)
def test_tables(inbox, name):
    text = refused(read_examples, TABLES[name](inbox), (8, 8))
    assert ("leads out of" in text) == any(repr(path) in name for path in PATHS)


@pytest.mark.parametrize("name", CLIP_FOLDERS)
def test_clips(inbox, name):
    folder = CLIP_FOLDERS[name](inbox)
    refused(load_clip, folder)
    if not name.startswith("tokenizer is told") and name not in TOWER_IS_RIGHT:
        refused(load_encoder, folder)


@pytest.mark.parametrize("name", NOISY_FOLDERS)
def test_noise_aware_clips(inbox, name):
    refused(NoisyClip.from_pretrained, NOISY_FOLDERS[name](inbox))


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(inbox, name):
    random_encoder().save_pretrained(inbox / "e")
    folder = copied(inbox / "e", inbox, "config.json", ENCODERS[name])
    refused(load_encoder, folder)


@pytest.mark.parametrize("name", PIPELINES)
def test_models(inbox, name):
    refused(load, str(PIPELINES[name](inbox)), "cpu")


@pytest.mark.parametrize("name", SHARDS)
def test_shards(inbox, name):
    items = list(shard_items([SHARDS[name](inbox)]))
    assert items
    assert [_decode(item, (8, 8)) for item in items] == [None] * len(items)


@pytest.mark.parametrize("name", corpus.NAMES)
def test_names(inbox, name):
    assert "must be a folder's name" in refused(file_name, name, "a class")
    if name not in (".", "a/b", "a\\b", "a\x1b[2J", "\u202ea"):
        assert "leads out of" in refused(inside, inbox, name, "a mask")


@pytest.mark.parametrize("name", ["...png", "..png", "a\x1b[2J.png", "a\\b.png"])
def test_names_of_pictures_that_become_folders(inbox, name):
    """Where pathlib finds the stem `..`, images would go beside the run's folder."""
    write(inbox / name, encoded("PNG"))
    try:
        found = load_references(inbox)
    except ValueError as error:
        assert "must be a folder's name" in str(error) or "no .jpg" in str(error)
    else:
        assert ".." not in found


def test_the_classes_of_a_head_stay_in_the_folder(inbox):
    """Nothing is drawn for a head of whose classes one is a path."""
    from guidekit.heads.augment import augment

    for name in corpus.NAMES:
        with pytest.raises(GuidekitError, match="a class of the head"):
            augment(None, None, ["a", name], 1, inbox / "out")
    assert not (inbox / "out").exists()


def test_what_is_echoed_is_printable(inbox, monkeypatch):
    monkeypatch.chdir(inbox)  # where the command line makes its folders
    evil = "evil\x1b]0;owned\x07\x9b2J\u202e"
    write(inbox / "run.json", {"sample": {"prompt": "a"}, evil: 1})
    words = [
        ["sample", "--config", inbox / "run.json"],
        ["sample", "--model", evil],
        ["sample", "--plugin", evil],
        ["train", evil],
        ["fit", evil, "--out", "h"],
        [evil],
    ]
    for args in words:
        result = CliRunner().invoke(main, list(map(str, args)))
        assert result.exit_code == 2
        assert len(result.stderr.splitlines()) == 1
        assert result.output.replace("\n", "").isprintable(), result.output


def test_the_page_links_to_what_is_there(inbox):
    from guidekit.cli.report import write_report

    names = ['a#b?c%41 "q"', "javascript:alert(1)", "<img src=x onerror=alert(1)>"]
    for seed, name in enumerate(names):
        write(inbox / name / f"{seed}.png", encoded("PNG"))
    record = {
        "notes": [],
        "account": [],
        "finished": [],
        "status": "finished",
        "seconds": 1.0,
        "versions": {},
        "machine": {},
        "scheduler": "x",
        "model": {"hash": None},
        "tokens": [],
        "targets": {
            str(i): {"path": f"{name}/{i}.png", "follows": "gone.png"}
            for i, name in enumerate(names)
        },
    }
    sample = {"prompt": "<script>\ud800\x1b", "negative": "", "model": "m", "seeds": [0, 1, 2]}
    run = {"sample": sample, "plugin": {}, "segment": [], "record": record}
    write(inbox / "run.json", json.dumps(run))
    page = write_report(inbox).read_text(encoding="utf-8")
    assert 'src="a%23b%3Fc%2541%20%22q%22/0.png"' in page
    assert 'src="javascript%3Aalert%281%29/1.png"' in page
    assert 'src="%3Cimg%20src%3Dx%20onerror%3Dalert%281%29%3E/2.png"' in page
    assert "<script>" not in page
    assert "\x1b" not in page


def test_the_size_of_the_corpus():
    """SECURITY.md says how many there are."""
    kinds = (
        PICTURES,
        WEIGHTS,
        HEADS,
        RECIPES,
        SETTINGS,
        LAYOUTS,
        TABLES,
        CLIP_FOLDERS,
        NOISY_FOLDERS,
        ENCODERS,
        PIPELINES,
        SHARDS,
        corpus.NAMES,
    )
    text = (Path(__file__).parents[2] / "SECURITY.md").read_text(encoding="utf-8")
    assert f"{sum(map(len, kinds))} inputs" in text
