"""References that are no squares: what encoders see of them, and which encoder an adapter reads."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import guidekit
import semantica_tiny
from guidekit import Condition, Reference, Sampling
from guidekit.errors import GuidekitError
from guidekit.references import read_references
from guidekit.semantica.adapter import ImageAdapter, load_adapter, random_adapter
from guidekit.semantica.encode import random_encoder
from guidekit.testing.miniatures import ddpm_pipeline, sd_pipeline
from guidekit_clip import Clip
from guidekit_semantica import Semantica
from ip_adapters import clip_tower, plus, published


def three(width=128, height=32):
    """Red, green and blue from left to right."""
    image = Image.new("RGB", (width, height))
    for i, colour in enumerate(("red", "lime", "blue")):
        image.paste(colour, (i * width // 3, 0, (i + 1) * width // 3, height))
    return image


def drawn(pipe, image, follow, **options):
    condition = Condition("red circle", image=image)
    return Sampling(pipe, condition, [follow], seeds=(5,), steps=2, **options).finish()


LIME = Image.new("RGB", (32, 32), "lime")


@pytest.fixture(params=["own", "published", "plus"])
def adapted(request, tmp_path):
    """A pipeline, and options of the plugin for an adapter of each kind."""
    pipe = sd_pipeline()
    if request.param == "own":
        return pipe, dict(adapter=Path("random"))
    weights = (published if request.param == "published" else plus)(pipe.unet)
    save_file(weights, tmp_path / "ip.safetensors")
    clip_tower().save_pretrained(tmp_path / "clip")
    return pipe, dict(adapter=tmp_path / "ip.safetensors", encoder=str(tmp_path / "clip"))


@pytest.mark.full
def test_an_adapter_reads_what_fit_says(adapted):
    pipe, options = adapted

    def images(image, **more):
        return drawn(pipe, image, Semantica(**options, **more)).images

    crop, pad, crops = (images(three(), fit=fit) for fit in ("crop", "pad", "crops"))
    for a, b in ((crop, pad), (crop, crops), (pad, crops)):
        assert (a - b).abs().max() > 1e-4
    torch.testing.assert_close(images(three()), images(LIME), atol=1e-5, rtol=0)  # the default
    # The same keys and values thrice weigh as much as once, so a square is as it was.
    torch.testing.assert_close(images(LIME, fit="crops"), images(LIME), atol=1e-5, rtol=0)
    torch.testing.assert_close(images(LIME, fit="pad"), images(LIME), atol=1e-5, rtol=0)


def test_three_squares_are_three_times_the_tokens():
    pipe = sd_pipeline()
    counts = {}
    for fit in ("crop", "pad", "crops"):
        run = Sampling(
            pipe,
            Condition("red circle", image=three()),
            [follow := Semantica(adapter=Path("random"), fit=fit)],
            seeds=(1, 2),
        )
        (follow,) = run.guidances
        assert follow._tokens.shape == follow._null.shape
        assert len(follow._tokens) == 2
        counts[fit] = follow._tokens.shape[1]
    assert counts["crops"] == 3 * counts["crop"] == 3 * counts["pad"]


def follow(pipe, images, seeds=(5, 6), **options):
    """Images of a Semantica model that follow a reference each."""
    conditions = [Condition(image=image) for image in images]
    return Sampling(pipe, conditions, [Semantica(**options)], seeds=seeds, steps=2).finish().images


def test_a_semantica_model_sees_a_crop_or_the_whole():
    pipe = semantica_tiny.pipeline()
    side = pipe.encoder.config.image_size
    (whole,) = Reference(three()).views(side, "pad")
    padded = guidekit.toolbox.to_image(whole / 2 + 0.5)

    def images(image, **options):
        return follow(pipe, [image, image], **options)

    expected = images(padded)
    assert torch.equal(images(three(), fit="pad"), expected)
    assert torch.equal(images(Reference(three(), fit="pad")), expected)
    assert not torch.equal(images(three()), expected)


def squares():
    """The three squares of `three` (1, 3, s, s), as the tiny encoder sees them."""
    size = (semantica_tiny.SIZE,) * 2
    images = [Image.new("RGB", size, colour) for colour in ("red", "lime", "blue")]
    return [Reference(image).pixels(semantica_tiny.SIZE)[None] for image in images]


def test_three_squares_are_read_side_by_side_by_a_semantica_model():
    """Beside the model called by hand with the tokens of all three."""
    pipe = semantica_tiny.pipeline()
    wide = Condition(image=three(48, 16))
    step = next(iter(Sampling(pipe, wide, [Semantica(w=0.5, fit="crops")], steps=2)))
    tokens = [pipe.states(square) for square in squares()]
    with torch.no_grad():
        cond = pipe.unet(step.z, step.timestep, torch.cat(tokens, 1)).sample
        null = pipe.unet(step.z, step.timestep, torch.zeros_like(tokens[0])).sample
    torch.testing.assert_close(step.out, null + 1.5 * (cond - null), rtol=1e-4, atol=1e-5)


def test_a_film_model_reads_the_mean_of_three_squares():
    pipe = semantica_tiny.pipeline(conditioning="film")
    wide = Condition(image=Reference(three(48, 16), fit="crops"))
    step = next(iter(Sampling(pipe, wide, steps=2)))
    tokens = [pipe.states(square) for square in squares()]
    with torch.no_grad():
        expected = pipe.unet(step.z, step.timestep, torch.stack(tokens).mean(0)).sample
    torch.testing.assert_close(step.out, expected, rtol=1e-4, atol=1e-5)


def test_references_of_one_and_of_three_squares_share_a_batch():
    """Each is as it is alone: the same tokens thrice weigh as much as once."""
    pipe = semantica_tiny.pipeline()
    wide, lime = Reference(three(), fit="crops"), Reference(LIME)
    both = follow(pipe, [wide, lime])
    alone = torch.cat([follow(pipe, [wide], (5,)), follow(pipe, [lime], (6,))])
    torch.testing.assert_close(both, alone, atol=1e-5, rtol=0)
    thrice = follow(pipe, [LIME], (6,), fit="crops")
    torch.testing.assert_close(thrice, alone[1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("on", [pytest.param("z", marks=pytest.mark.full), "x0"])
def test_clip_looks_at_a_third_of_each_crop(on, tmp_path):
    pipe = ddpm_pipeline()
    three(48, 16).save(tmp_path / "three.png")

    def energy(guidance):
        sampling = Sampling(pipe, Condition(), [guidance], seeds=(5, 6), steps=2)
        next(iter(sampling))
        return torch.tensor(sampling.account.rows[0]["energy"])

    def clip(**options):
        return Clip(encoder="random", on=on, views=0, structure=2.0, style=1.0, **options)

    crops = energy(clip(image=(tmp_path / "three.png",), fit="crops"))
    parts = read_references([tmp_path / "three.png"], (16, 16), "crops")
    each = [energy(clip().towards(images=part.expand(2, 1, -1, -1, -1))) for part in parts]
    if on == "x0":  # in z each reference has noise of its own
        torch.testing.assert_close(crops, sum(each) / 3, rtol=1e-4, atol=1e-4)
    crop, pad = (energy(clip(image=(tmp_path / "three.png",), fit=f)) for f in ("crop", "pad"))
    assert not torch.allclose(crop, pad)
    assert not torch.allclose(crop, crops)
    torch.testing.assert_close(crop, each[1], rtol=1e-5, atol=1e-4)


def test_an_adapter_is_bound_to_its_encoder(tmp_path):
    pipe, encoder = sd_pipeline(), random_encoder()
    other = encoder.copied(source="another")
    next(other.parameters()).data += 1
    adapter = random_adapter(pipe.unet, encoder.shapes()[1])
    bound = ImageAdapter(
        **{k: v for k, v in adapter.config.items() if not k.startswith("_")}
        | {"encoder": encoder.source, "fingerprint": encoder.fingerprint()}
    )
    bound.load_state_dict(adapter.state_dict())
    bound.save_pretrained(tmp_path / "new")
    adapter.save_pretrained(tmp_path / "old")
    for name in ("new", "old"):
        encoder.half().save_pretrained(tmp_path / name / "encoder")  # half precision is the same
    other.save_pretrained(tmp_path / "other")
    assert load_adapter(tmp_path / "new", pipe.unet).config.encoder == encoder.source

    def run(name, **options):
        return drawn(pipe, three(), Semantica(adapter=tmp_path / name, **options))

    own = run("new")
    assert not own.account.notes
    with pytest.raises(GuidekitError) as refused:
        run("new", encoder=str(tmp_path / "other"))
    for text in (encoder.source, "another", encoder.fingerprint(), other.fingerprint()):
        assert text in str(refused.value)
    unknown = run("old")
    assert torch.equal(unknown.images, own.images)
    (note,) = unknown.account.notes
    assert "old does not say which encoder it was trained with" in note
