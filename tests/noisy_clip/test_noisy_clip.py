"""Noise-aware CLIP: it begins as the frozen one, knows levels and survives the disk."""

import math

import open_clip
import pytest
import timm
import torch

import clips
from guidekit.errors import GuidekitError
from guidekit.noise import Level
from guidekit.noisy_clip import files
from guidekit.noisy_clip.files import load_clip
from guidekit.noisy_clip.model import NoisyClip
from guidekit.noisy_clip.norms import AdaptiveNorm, LevelEmbedding

KINDS = ("resnet", "vit", "timm")
LEVELS = (-math.inf, -6.0, 0.0, 6.0, math.inf)


def pictures(count=3, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
def test_at_first_it_is_the_frozen_encoder_at_every_level(kind):
    clip = clips.clip(kind)
    noisy, x = NoisyClip(clip, 16).eval(), pictures()
    expected = clip.model.encode_image(noisy.normalised(x))
    expected = expected[0] if isinstance(expected, tuple) else expected
    for logsnr in LEVELS:
        found = noisy(x, torch.full((3,), logsnr)).embedding
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_levels_change_what_it_sees_each_picture_by_its_own(kind):
    noisy, x = clips.noisy(kind), pictures()
    mixed = torch.tensor([-6.0, 0.0, 6.0])
    together = noisy(x, mixed).embedding
    for i in range(3):
        alone = noisy(x[i : i + 1], mixed[i : i + 1]).embedding
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)
        other = noisy(x[i : i + 1], mixed[i : i + 1] + 2).embedding
        assert (alone - other).abs().max() > 1e-3
    assert all(norm.embedding is None for norm in noisy.norms)


def test_an_exception_leaves_no_level_behind():
    noisy = clips.noisy()
    with pytest.raises(RuntimeError):
        noisy(torch.zeros(1, 7, 32, 32), torch.zeros(1))
    assert all(norm.embedding is None for norm in noisy.norms)


def test_embedding_of_levels_is_finite_and_tells_them_apart():
    torch.manual_seed(0)
    found = LevelEmbedding(16)(torch.tensor(LEVELS))
    assert found.isfinite().all()
    assert torch.pdist(found).min() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_stages_are_maps_and_do_not_change_the_embedding(kind):
    noisy, x, level = clips.noisy(kind), pictures(), torch.zeros(3)
    seen = noisy(x, level, [0, 1])
    assert [s.ndim for s in seen.stages] == [4, 4]
    torch.testing.assert_close(seen.embedding, noisy(x, level).embedding, rtol=1e-4, atol=1e-5)
    with pytest.raises(GuidekitError, match="the encoder has 0 to"):
        noisy(x, level, [17])


def test_schedulers_of_every_kind_ask_the_same_question():
    noisy, x0, eps = clips.noisy(), pictures(), pictures().flip(0)
    sigma = 0.7
    kinds = {
        "ve": (1.0, sigma),
        "flow": (1 / (1 + sigma), sigma / (1 + sigma)),
        "vp": (1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)),
    }
    found = [
        noisy.at(a * x0 + s * eps, Level(a, s, kind, "epsilon")).embedding
        for kind, (a, s) in kinds.items()
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [0, 4])
def test_it_survives_the_disk_without_a_pickle(tmp_path, channels):
    noisy = clips.noisy("vit", channels, factor=2 if channels else 1)
    noisy.save_pretrained(tmp_path / "x")
    again = NoisyClip.from_pretrained(tmp_path / "x")
    x = torch.randn(2, noisy.channels, 16, 16)
    one, two = (n(x, torch.zeros(2)).embedding for n in (noisy, again))
    torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-2)  # kept in half precision
    words = ["a red circle", "a blue square"]
    torch.testing.assert_close(again.texts(words), noisy.texts(words), rtol=1e-2, atol=1e-2)
    assert again.reads_latents == bool(channels)
    kept = {p.name for p in (tmp_path / "x").iterdir()}
    assert kept == {"open_clip_config.json", "noisy_clip.json", "noisy_clip.safetensors"}


def test_what_is_no_noise_aware_clip_is_refused(tmp_path):
    clips.clip().save(tmp_path)
    assert load_clip(tmp_path).size == (32, 32)
    for name in (tmp_path, "nothing"):
        with pytest.raises(GuidekitError, match="no noise-aware CLIP"):
            NoisyClip.from_pretrained(name)
    with pytest.raises(GuidekitError, match="ARCHITECTURE/TAG"):
        load_clip("nothing")
    with pytest.raises(GuidekitError, match="no weights 'bogus' of RN50; there are openai"):
        load_clip("RN50/bogus")
    with pytest.raises(GuidekitError, match="could not load RN50/openai"):
        load_clip("RN50/openai")  # tests download nothing
    with pytest.raises(GuidekitError, match="is noise-aware; give a clean CLIP"):
        load_clip("scenes-clip-noisy")
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(GuidekitError, match="no safetensors"):
        load_clip(tmp_path)


@pytest.mark.parametrize(
    ("name", "quick"), [("ViT-B-32/openai", True), ("ViT-B-32/laion2b_s34b_b79k", False)]
)
def test_a_tag_has_the_activation_that_it_was_trained_with(monkeypatch, name, quick):
    """open_clip itself only warns that the model has another one."""
    asked = {}

    def without_download(architecture, **options):
        asked.update(options)
        return clips.clip().model

    monkeypatch.setattr(files, "require_hub", lambda *_: None)
    monkeypatch.setattr(open_clip, "create_model", without_download)
    config = load_clip(name).config["model_cfg"]
    assert asked["force_quick_gelu"] == quick == config.get("quick_gelu", False)


def test_a_built_in_encoder_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    NoisyClip.from_pretrained("scenes-clip-noisy")
    load_clip("scenes-clip")
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("kind", ["LayerNormAct2d", "LayerNorm2d"])
def test_norms_of_maps_are_modulated_by_channel(kind):
    """timm's ViTamin has the first, whose class is a LayerNorm as well."""
    norm = getattr(timm.layers, kind)(6)
    adaptive = AdaptiveNorm(norm, 4)
    torch.nn.init.normal_(adaptive.gains.weight)
    adaptive.embedding = torch.randn(2, 4)
    x = torch.randn(2, 6, 3, 3)
    scale, shift = adaptive.gains(adaptive.embedding).chunk(2, 1)
    expected = norm(x) * (1 + scale[..., None, None]) + shift[..., None, None]
    torch.testing.assert_close(adaptive(x), expected)
