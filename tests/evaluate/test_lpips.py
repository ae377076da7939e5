"""LPIPS by a file of weights: torch-fidelity's own numbers, without a download."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from guidekit.errors import GuidekitError
from guidekit.evaluate.lpips import load_lpips
from guidekit.images import to_uint8
from lpips_weights import nothing_downloaded, random_lpips
from plans import run


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights, and the weights."""
    _, found = random_lpips()
    save_file(found, path := tmp_path_factory.mktemp("lpips") / "lpips.safetensors")
    return path, found


def images(n):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(n)]


def test_lpips_is_torch_fidelitys(weights, monkeypatch):
    theirs = pytest.importorskip("torch_fidelity.sample_similarity_lpips")
    path, found = weights
    nothing_downloaded(monkeypatch, theirs)
    network = theirs.SampleSimilarityLPIPS("lpips")
    network.net.load_state_dict(
        {k.removeprefix("net."): v for k, v in found.items() if k.startswith("net.")}
    )
    assert sorted(network.state_dict()) == sorted(found)
    a, b = images(2)
    wanted = float(network(to_uint8(a)[None], to_uint8(b)[None]))
    ours = load_lpips(path)
    assert ours.distance(a, b) == pytest.approx(wanted, rel=1e-4)
    assert wanted > 1e-3
    assert ours.distance(a, a) == 0
    assert len(ours.hashes) == 1


def test_spread_is_the_mean_of_all_pairs(weights):
    lpips, drawn = load_lpips(weights[0]), dict(zip("abc", images(3), strict=True))
    pairs = [lpips.distance(drawn[i], drawn[j]) for i, j in ("ab", "ac", "bc")]
    assert lpips.spread([*"abc"], drawn.__getitem__) == pytest.approx(np.mean(pairs))


@pytest.mark.full
def test_eval_has_its_columns_and_refuses_one_that_guided(weights, tmp_path):
    path = weights[0]
    for folder, numbers in (("a", (0, 1)), ("b", (1, 0))):
        (tmp_path / folder).mkdir()
        for i, image in zip(numbers, images(2), strict=True):
            image.save(tmp_path / folder / f"{i}.png")
            (tmp_path / folder / f"{i}.txt").write_text("noise")
    a, b = tmp_path / "a", tmp_path / "b"
    words = ("--lpips", path, "--json")
    done = run("eval", "inverse", a, b, "--real", b, "--paired", *words)
    assert done.exit_code == 0, done.stderr
    table = json.loads(done.stdout)
    far, same, gap = (row["LPIPS"] for row in table["rows"])
    assert same == 0 < far == gap
    assert len(table["lpips"]["sha256"]) == 1
    (row,) = json.loads(run("eval", "diversity", a, *words).stdout)["rows"]
    assert row["LPIPS"] == pytest.approx(far)
    record = {"sample": {"prompt": "noise"}, "plugin": {"energy": {"network": str(path)}}}
    (a / "run.json").write_text(json.dumps(record))
    done = run("eval", "inverse", a, "--real", b, *words)
    assert done.exit_code == 2
    assert "guided the images" in done.stderr


def test_other_weights_are_refused(tmp_path):
    with pytest.raises(GuidekitError, match="no such file"):
        load_lpips(tmp_path / "none")
    save_file({"lin0.model.1.weight": torch.rand(1, 64, 1, 1)}, tmp_path / "x.safetensors")
    with pytest.raises(GuidekitError, match="not its weights"):
        load_lpips(tmp_path / "x.safetensors")
