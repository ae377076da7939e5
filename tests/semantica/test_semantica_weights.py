"""Weights of adapters and their encoders: as diffusers reads them, and damaged, unsafe or alien."""

import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from guidekit import Condition, Reference, Sampling
from guidekit.__main__ import main
from guidekit.errors import GuidekitError
from guidekit.semantica.adapter import ImageAdapter, from_published, load_adapter, new_adapter
from guidekit.testing.miniatures import sd_pipeline
from guidekit.zoo.shipped import ZOO
from guidekit_semantica import Semantica
from ip_adapters import clip_tower, plus, published

RED = Condition("red circle", "blue", image=Reference(Image.new("RGB", (20, 16), "red")))


def drawn(pipe, condition, guidances=(), **options):
    return Sampling(pipe, condition, guidances, seeds=(5, 6), steps=2, **options).finish()


def test_adapter_equals_diffusers_ip_adapter():
    ours, theirs = sd_pipeline().unet, sd_pipeline().unet
    weights = published(ours)
    adapter = from_published(weights, ours)
    parts = {"image_proj": {}, "ip_adapter": {}}
    for key, value in weights.items():
        part, _, rest = key.partition(".")
        parts[part][rest] = value
    theirs._load_ip_adapter_weights([parts], low_cpu_mem_usage=False)
    generator = torch.Generator().manual_seed(1)
    z, text, image = (
        torch.randn(shape, generator=generator) for shape in ((2, 4, 16, 16), (2, 7, 32), (2, 24))
    )
    with torch.no_grad():
        expected = theirs(z, 10, text, added_cond_kwargs={"image_embeds": [image[:, None]]}).sample
        plain = ours(z, 10, text).sample
        with adapter.attached(ours, adapter(image)):
            found = ours(z, 10, text).sample
        with adapter.attached(ours, adapter(image), scale=0.0):
            assert torch.equal(ours(z, 10, text).sample, plain)
    assert (plain - expected).abs().max() > 1e-2
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max().clamp(min=1)


def test_weights_of_another_model_are_refused(tmp_path):
    unet = sd_pipeline().unet
    weights = published(unet)
    for key, message in (
        ("ip_adapter.1.to_k_ip.weight", "attention sites"),
        ("extra.weight", "no IP-Adapter weights"),
    ):
        wrong = dict(weights)
        if key in wrong:
            del wrong[key], wrong["ip_adapter.1.to_v_ip.weight"]
        else:
            wrong[key] = torch.zeros(1)
        with pytest.raises(GuidekitError, match=message):
            from_published(wrong, unet)
    weights["ip_adapter.1.to_k_ip.weight"] = torch.zeros(3, 3)
    with pytest.raises(GuidekitError, match="take those made for this kind"):
        from_published(weights, unet)
    with pytest.raises(GuidekitError, match="give a folder saved by guidekit"):
        load_adapter(tmp_path / "no.bin", unet)


@pytest.mark.parametrize("weights", [published, plus])
def test_pictures_are_those_of_diffusers_with_an_ip_adapter(tmp_path, weights):
    """With classifier-free guidance, so the branch without the image is diffusers' as well."""
    from transformers import CLIPImageProcessor

    pipe, theirs = sd_pipeline(), sd_pipeline()
    given = weights(pipe.unet)
    save_file(given, tmp_path / "ip.safetensors")
    clip = clip_tower()
    clip.save_pretrained(tmp_path / "clip")
    adapter = tmp_path / "ip.safetensors"
    follow = Semantica(adapter=adapter, encoder=str(tmp_path / "clip"))
    found = drawn(pipe, RED, [follow], cfg=7.5).images

    processor = CLIPImageProcessor(size=16, crop_size=16)
    theirs.register_modules(image_encoder=clip, feature_extractor=processor)
    parts = {"image_proj": {}, "ip_adapter": {}}
    for key, value in given.items():
        part, _, rest = key.partition(".")
        parts[part][rest] = value
    theirs.unet._load_ip_adapter_weights([parts], low_cpu_mem_usage=False)
    expected = theirs(
        ["red circle"] * 2,
        negative_prompt=["blue"] * 2,
        ip_adapter_image=RED.image.picture,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        num_inference_steps=2,
        guidance_scale=7.5,
        output_type="pt",
    ).images
    plain = drawn(pipe, Condition("red circle", "blue"), cfg=7.5).images
    assert (found - plain).abs().max() > 1e-3
    assert (found - expected).abs().max() < 2e-5
    with pytest.raises(GuidekitError, match="needs the image encoder"):
        drawn(pipe, RED, [Semantica(adapter=adapter)])


def test_an_adapter_of_another_text_is_refused(tmp_path):
    unet = sd_pipeline().unet
    adapter = new_adapter(unet, 16)
    other = ImageAdapter(adapter.config.sites, 2 * unet.config.cross_attention_dim, 16)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(GuidekitError, match="whose text is 64 wide, not 32"):
        load_adapter(tmp_path / "other", unet)


@pytest.mark.parametrize("kind", [published, plus])
@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda w: {k: v for k, v in w.items() if "image_proj" not in k}, "lack the projection"),
        (
            lambda w: {k.replace("adapter.1.", "adapter.0."): v for k, v in w.items()},
            "lack ip_adapter.1.to_k_ip.weight",
        ),
        (lambda w: {k: v for k, v in w.items() if "norm" not in k}, "image_proj.*norm"),
        (
            lambda w: {k: torch.ones(3) if "norm" in k else v for k, v in w.items()},
            "image_proj is not whole or does not fit together",
        ),
        (
            lambda w: {k: v for k, v in w.items() if "proj_in" not in k and ".proj." not in k},
            "lack",
        ),
    ],
)
def test_a_damaged_ip_adapter(tmp_path, kind, damage, message):
    unet, file = sd_pipeline().unet, tmp_path / "ip.safetensors"
    save_file(damage(kind(unet)), file)
    with pytest.raises(GuidekitError, match=f"adapter {file}: .*{message}") as refused:
        load_adapter(file, unet)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


def test_other_files_that_are_no_ip_adapter(tmp_path):
    unet, file = sd_pipeline().unet, tmp_path / "ip.safetensors"
    file.write_bytes(b"garbage" * 9)
    with pytest.raises(GuidekitError, match=f"adapter {file} is damaged"):
        load_adapter(file, unet)
    wide = published(unet) | {
        f"image_proj.{name}": torch.zeros(shape)
        for name, shape in (
            ("proj.weight", (4 * 64, 24)),
            ("proj.bias", (4 * 64,)),
            ("norm.weight", (64,)),
            ("norm.bias", (64,)),
        )
    }
    save_file(wide, file)
    with pytest.raises(GuidekitError, match="tokens 64 wide, the model's text is 32"):
        load_adapter(file, unet)


def pickled(folder, model, name):
    """Replaces a saved model's weights by a pickle of them."""
    model.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    torch.save(model.state_dict(), folder / name)


def test_pickles_are_never_read(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "load", lambda *args, **_: calls.append(args) or {})
    pipe = sd_pipeline()
    pickled(tmp_path / "adapter", new_adapter(pipe.unet, 16), "diffusion_pytorch_model.bin")
    with pytest.raises(GuidekitError, match="adapter .* cannot be loaded: .*safetensors"):
        load_adapter(tmp_path / "adapter", pipe.unet)
    pickled(tmp_path / "clip", clip_tower(), "pytorch_model.bin")
    save_file(published(pipe.unet), tmp_path / "ip.safetensors")
    follow = Semantica(adapter=tmp_path / "ip.safetensors", encoder=str(tmp_path / "clip"))
    with pytest.raises(GuidekitError, match="clip cannot be loaded: .*safetensors"):
        drawn(pipe, RED, [follow])
    assert not calls


def test_an_adapter_that_lacks_a_weight(tmp_path):
    unet = sd_pipeline().unet
    adapter = new_adapter(unet, 16)
    adapter.save_pretrained(tmp_path)
    weights = {k: v for k, v in adapter.state_dict().items() if k != "projection.norm.bias"}
    save_file(weights, next(tmp_path.glob("*.safetensors")), {"format": "pt"})
    with pytest.raises(GuidekitError, match="lacks projection.norm.bias; give a folder"):
        load_adapter(tmp_path, unet)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"projection_dim": 20}, "reads 24 channels, the image encoder gives 20; set semantica"),
        (None, r"semantica.encoder \S*/clip is no folder; .*in \S* there are other"),
    ],
)
def test_a_clip_that_does_not_do(tmp_path, changes, message):
    pipe = sd_pipeline()
    save_file(published(pipe.unet), tmp_path / "ip.safetensors")
    clip_tower(**changes or {}).save_pretrained(tmp_path / ("clip" if changes else "other"))
    follow = Semantica(adapter=tmp_path / "ip.safetensors", encoder=str(tmp_path / "clip"))
    with pytest.raises(GuidekitError, match=message):
        drawn(pipe, RED, [follow])


def test_a_transparent_picture_is_on_white_for_clip_too(tmp_path):
    pipe = sd_pipeline()
    save_file(published(pipe.unet), tmp_path / "ip.safetensors")
    clip_tower().save_pretrained(tmp_path / "clip")
    follow = Semantica(adapter=tmp_path / "ip.safetensors", encoder=str(tmp_path / "clip"))
    clear, white = (
        Condition("red circle", image=Reference(Image.new("RGBA", (16, 20), colour)))
        for colour in ((0, 0, 0, 0), (255, 255, 255, 255))
    )
    assert torch.equal(drawn(pipe, clear, [follow]).images, drawn(pipe, white, [follow]).images)


def test_an_encoders_folder_is_kept_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "scenes-clip"):
        (tmp_path / name).mkdir()
    assert Semantica(encoder="mine").encoder == str(tmp_path.resolve() / "mine")
    for name in ("", "dinov2-b", "scenes-clip"):  # names, and a built-in that comes first
        assert Semantica(encoder=name).encoder == name


def test_damaged_weights_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = sd_pipeline()
    pipe.save_pretrained("model")
    new_adapter(pipe.unet, 16).save_pretrained("adapter")
    shutil.copytree(ZOO / "scenes-clip", "encoder")
    Path("encoder/open_clip_model.safetensors").write_bytes(b"garbage" * 9)
    words = "sample --model model --prompt red --image scene-3 --plugin semantica --steps 1"
    options = ("--set", "semantica.adapter=adapter", "--set", "semantica.encoder=encoder")
    result = CliRunner().invoke(main, [*words.split(), *options])
    assert result.exit_code == 2, result.exception
    assert len(result.stderr.splitlines()) == 1
    assert "encoder/open_clip_model.safetensors is damaged" in result.stderr
