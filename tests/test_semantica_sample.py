"""Semantica in the own loop and from the command line; adapters against diffusers' processors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from guidekit import Condition, Reference, Sampling, load, scenes
from guidekit.cli import main
from guidekit.evaluate import load_judge, see
from guidekit.guidance import FeatureRead
from guidekit.loading import make_scheduler
from guidekit.miniatures import sd_pipeline
from guidekit.pictures import to_image
from guidekit.references import load_references
from guidekit.semantica.adapter import ImageAdapter, from_published, load_adapter, new_adapter
from guidekit.semantica.adapter_train import AdapterOptions, make
from guidekit.train.loop import Loop, Options
from guidekit_semantica import Semantica

import semantica_tiny


@pytest.fixture(scope="module")
def pipe():
    return semantica_tiny.pipeline()


def picture(colour, size=(20, 16)):
    return Image.new("RGB", size, colour)


RED, BLUE = (Condition(image=Reference(picture(c))) for c in ("red", "blue"))


def drawn(pipe, conditions, guidances=(), seeds=(5, 6), steps=4, **options):
    return Sampling(pipe, conditions, guidances, seeds=seeds, steps=steps, **options).finish()


@pytest.mark.parametrize("conditioning", ["tokens", "film"])
def test_the_own_loop_is_the_pipeline(conditioning):
    pipe = semantica_tiny.pipeline(conditioning=conditioning)
    for w in (0.0, 0.5):
        generators = [torch.Generator().manual_seed(s) for s in (5, 6)]
        images = [c.image.picture for c in (RED, BLUE)]
        expected = pipe(
            images, w, num_inference_steps=4, generator=generators, output_type="pt"
        ).images
        assert torch.equal(drawn(pipe, [RED, BLUE], cfg=1 + w).images, expected)
        plugin = drawn(pipe, [RED, BLUE], [Semantica(w=w)])
        assert torch.equal(plugin.images, expected)
        if w:
            assert not plugin.account.notes


def test_plugin_on_a_semantica_model(pipe):
    plain = drawn(pipe, RED).images
    assert torch.equal(drawn(pipe, RED, [Semantica(scale=0)]).images, plain)
    assert torch.equal(drawn(pipe, RED, [Semantica(start=1.0)]).images, plain)
    guided = drawn(pipe, RED, [Semantica(w=2.0)]).images
    assert not torch.equal(guided, plain)
    assert torch.equal(drawn(pipe, RED, [Semantica(w=1.0, scale=2.0)]).images, guided)
    alone = drawn(pipe, RED, [Semantica(w=2.0)], seeds=[6]).images
    assert (alone[0] - guided[1]).abs().max() < 1e-4
    other = drawn(pipe, BLUE, [Semantica(w=2.0)]).images
    assert (other - guided).abs().max() > 1e-4


def test_features_and_energies_reach_it(pipe):
    from dataclasses import dataclass

    from guidekit import Guidance

    @dataclass(kw_only=True)
    class Dark(Guidance):
        scale: float = 3.0

        def prepare(self, run):
            self.read = run.read(self, FeatureRead(("mid_block.attentions.*",)))

        def energy(self, step):
            (features,) = step.cond.features(self.read).values()
            assert features.shape[1:] == (16, 8, 8)
            return step.x0.mean((1, 2, 3))

    assert drawn(pipe, RED, [Dark()]).latents.mean() < drawn(pipe, RED).latents.mean()


@pytest.mark.parametrize(
    "condition, guidances, options, message",
    [
        (Condition(), [], {}, "follows a picture: give --image"),
        (Condition("a fox", image=RED.image), [], {}, "reads no prompt"),
        (RED, [Semantica()], {"cfg": 2.0}, "cfg is 1 \\+ w"),
        (RED, [], {"height": 15}, "multiples of 2"),
    ],
)
def test_what_cannot_work_is_refused(pipe, condition, guidances, options, message):
    with pytest.raises(ValueError, match=message):
        drawn(pipe, condition, guidances, **options)


def test_a_picture_that_nothing_reads_is_refused():
    with pytest.raises(ValueError, match="reads no image; leave it out"):
        drawn(sd_pipeline(), Condition("red", image=RED.image))
    with pytest.raises(ValueError, match="needs an adapter"):
        drawn(sd_pipeline(), Condition("red", image=RED.image), [Semantica()])
    with pytest.raises(ValueError, match="at least 0"):
        Semantica(w=-1)


def published(unet, embedding=24, count=4):
    """Random weights in the form of a published IP-Adapter."""
    generator, width = torch.Generator().manual_seed(0), unet.config.cross_attention_dim

    def random(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    weights = {
        "image_proj.proj.weight": random(count * width, embedding),
        "image_proj.proj.bias": random(count * width),
        "image_proj.norm.weight": 1 + random(width), "image_proj.norm.bias": random(width),
    }  # fmt: skip
    sites = [n for n in unet.attn_processors if n.endswith("attn2.processor")]
    for index, name in enumerate(sites):
        inner = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for kind in "kv":
            weights[f"ip_adapter.{2 * index + 1}.to_{kind}_ip.weight"] = random(inner, width)
    return weights


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
    for key, message in (("ip_adapter.1.to_k_ip.weight", "attention sites"),
                         ("extra.weight", "no IP-Adapter weights")):  # fmt: skip
        wrong = dict(weights)
        if key in wrong:
            del wrong[key], wrong["ip_adapter.1.to_v_ip.weight"]
        else:
            wrong[key] = torch.zeros(1)
        with pytest.raises(ValueError, match=message):
            from_published(wrong, unet)
    weights["ip_adapter.1.to_k_ip.weight"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match="take those made for this kind"):
        from_published(weights, unet)
    with pytest.raises(ValueError, match="give a folder saved by guidekit"):
        load_adapter(tmp_path / "no.bin", unet)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An adapter trained for a few steps on tiny scenes, and its losses."""
    root = tmp_path_factory.mktemp("adapter")
    sd_pipeline().save_pretrained(root / "sd")
    semantica_tiny.encoder().save_pretrained(root / "encoder")
    options = AdapterOptions(
        backbone=str(root / "sd"), encoder=str(root / "encoder"), pages=6, per_page=2,
        low=-2.0, high=2.0,
    )  # fmt: skip
    loop = Loop(make(options, root, 64), Options(steps=4, batch=4, log_every=1, warmup=1),
                root / "run", quiet=True)  # fmt: skip
    before = [p.clone() for p in loop.task.pipeline.unet.parameters()]
    loop.run()
    loop.export(root / "model")
    after = loop.task.pipeline.unet.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return root


def test_trained_adapter_is_used_by_the_plugin(trained):
    assert len((trained / "run/metrics.jsonl").read_text().splitlines()) == 4
    adapter = ImageAdapter.from_pretrained(trained / "model")
    assert all(float(layer.weight.detach().abs().max()) > 0 for layer in adapter.to_v)
    pipe = sd_pipeline()
    for layer in adapter.to_v:
        layer.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    adapter.save_pretrained(trained / "strong")
    (trained / "strong/encoder").symlink_to(trained / "model/encoder")
    red, blue = (Condition("red circle", image=c.image) for c in (RED, BLUE))
    follow = Semantica(adapter=trained / "strong")
    plain = drawn(pipe, Condition("red circle")).images
    guided = drawn(pipe, red, [follow])
    assert torch.equal(drawn(pipe, red, [Semantica(scale=0)]).images, plain)
    assert (guided.images - plain).abs().max() > 1e-3 and not guided.account.notes
    assert (drawn(pipe, blue, [follow]).images - guided.images).abs().max() > 1e-4
    alone = drawn(pipe, red, [follow], seeds=[6]).images
    assert (alone[0] - guided.images[1]).abs().max() < 1e-4
    assert torch.equal(drawn(pipe, red, [follow]).images, guided.images)
    wrong = sd_pipeline().unet.__class__(**dict(pipe.unet.config) | {"layers_per_block": 2})
    with pytest.raises(ValueError, match="other attention sites"):
        load_adapter(trained / "strong", wrong)


def test_adapters_are_trained_for_stable_diffusion_alone(tmp_path):
    options = AdapterOptions(backbone="digits-ddpm")
    with pytest.raises(ValueError, match="digits-ddpm is a DDPMPipeline; adapters are trained for"):
        make(options, tmp_path, 32)


def test_a_new_adapter_changes_nothing():
    unet = sd_pipeline().unet
    adapter = new_adapter(unet, 16)
    z, text, tokens = torch.randn(1, 4, 16, 16), torch.randn(1, 7, 32), torch.randn(1, 5, 16)
    with torch.no_grad():
        plain = unet(z, 10, text).sample
        with adapter.attached(unet, adapter(tokens)):
            torch.testing.assert_close(unet(z, 10, text).sample, plain)


def test_command_line(pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe.save_pretrained("model")
    assert type(load("model")).__name__ == "SemanticaPipeline"
    picture("red").save("ref.png")
    args = ["sample", "--model", "model", "--plugin", "semantica", "--steps", "2"]
    one = CliRunner().invoke(main, [*args, "--image", "ref.png", "--seeds", "0-1", "--out", "o"])
    assert one.exit_code == 0, one.output
    assert Path("o/reference.png").exists() and Path("o/unguided/1.png").exists()
    assert "reference.png" in Path("o/index.html").read_text()
    again = CliRunner().invoke(main, ["sample", "--config", "o/run.json", "--out", "p"])
    assert again.exit_code == 0, again.output
    assert Image.open("o/1.png").tobytes() == Image.open("p/1.png").tobytes()
    for name in ("fish/a.png", "bird/b.png"):
        Path("classes", name).parent.mkdir(parents=True)
        picture(name[0] == "f" and "red" or "blue").save(Path("classes", name))
    folder = ["--image-folder", "classes", "--per-image", "3", "--batch", "4"]
    many = CliRunner().invoke(main, [*args, *folder, "--out", "set"])
    assert many.exit_code == 0, many.output
    files = sorted(str(p.relative_to("set")) for p in Path("set").glob("*/*.png"))
    assert files == [f"bird/{i}.png" for i in (0, 1, 2)] + [f"fish/{i}.png" for i in (3, 4, 5)]
    run = json.loads(Path("set/run.json").read_text())
    assert run["record"]["finished"] == run["sample"]["seeds"] == list(range(6))
    assert json.loads(Image.open("set/fish/4.png").text["guidekit"])["sample"]["seeds"] == [4]
    assert run["record"]["places"]["4"] == "fish/4.png" and not Path("set/unguided").exists()
    for wrong, message in (
        (["--image", "none.png"], "no such file"),
        (["--per-image", "2"], "needs image_folder"),
        (["--image", "ref.png", *folder], "not both"),
        ([], "follows a picture"),
    ):
        refused = CliRunner().invoke(main, [*args, *wrong])
        assert refused.exit_code == 2 and message in refused.output, refused.output


def test_folders_of_references(tmp_path):
    for name in ("a/1.png", "b.png", "a/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture("red").save(tmp_path / name)
    with pytest.raises(ValueError, match="two pictures for 'a'"):
        load_references(tmp_path)
    (tmp_path / "a/2.png").unlink()
    picture("blue").resize((3000, 1500)).save(tmp_path / "b.png")
    found = load_references(tmp_path)
    assert found["b"].picture.size == (1024, 512)
    assert list(found) == ["a", "b"] and found["b"].pixels(8).shape == (3, 8, 8)
    with pytest.raises(ValueError, match="no .jpg"):
        load_references(tmp_path / "nothing")


def plus(unet, channels=16):
    """Random weights in the form of a published IP-Adapter Plus: a resampler of all tokens."""
    width, inner = unet.config.cross_attention_dim, 64
    generator = torch.Generator().manual_seed(3)
    shapes = {"latents": (1, 4, inner), "proj_in.weight": (inner, channels),
              "proj_in.bias": (inner,), "proj_out.weight": (width, inner),
              "proj_out.bias": (width,),
              "norm_out.weight": (width,), "norm_out.bias": (width,)}  # fmt: skip
    for i in range(4):
        for norm in ("0.norm1", "0.norm2", "1.0"):
            shapes |= {f"layers.{i}.{norm}.{part}": (inner,) for part in ("weight", "bias")}
        shapes |= {
            f"layers.{i}.0.to_q.weight": (inner, inner),
            f"layers.{i}.0.to_kv.weight": (2 * inner, inner),
            f"layers.{i}.0.to_out.weight": (inner, inner),
            f"layers.{i}.1.1.weight": (4 * inner, inner),
            f"layers.{i}.1.3.weight": (inner, 4 * inner),
        }
    resampler = {
        f"image_proj.{name}": torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        for name, shape in shapes.items()
    }
    attention = {k: v for k, v in published(unet).items() if k.startswith("ip_adapter")}
    return resampler | attention


@pytest.mark.parametrize("weights", [published, plus])
def test_pictures_are_those_of_diffusers_with_an_ip_adapter(tmp_path, weights):
    """With classifier-free guidance, so the branch without the picture is diffusers' as well."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    pipe, theirs = sd_pipeline(), sd_pipeline()
    given = weights(pipe.unet)
    save_file(given, tmp_path / "ip.safetensors")
    torch.manual_seed(0)
    clip = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, projection_dim=24, num_hidden_layers=2,
            num_attention_heads=2, image_size=16, patch_size=8,
        )
    ).eval()  # fmt: skip
    clip.save_pretrained(tmp_path / "clip")
    condition = Condition("red circle", "blue", image=RED.image)
    adapter = tmp_path / "ip.safetensors"
    follow = Semantica(adapter=adapter, encoder=str(tmp_path / "clip"))
    found = drawn(pipe, condition, [follow], steps=2, cfg=7.5).images

    processor = CLIPImageProcessor(size=16, crop_size=16)
    theirs.register_modules(image_encoder=clip, feature_extractor=processor)
    parts = {"image_proj": {}, "ip_adapter": {}}
    for key, value in given.items():
        part, _, rest = key.partition(".")
        parts[part][rest] = value
    theirs.unet._load_ip_adapter_weights([parts], low_cpu_mem_usage=False)
    expected = theirs(
        ["red circle"] * 2, negative_prompt=["blue"] * 2, ip_adapter_image=RED.image.picture,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        num_inference_steps=2, guidance_scale=7.5, output_type="pt",
    ).images  # fmt: skip
    assert (
        found - drawn(pipe, Condition("red circle", "blue"), steps=2, cfg=7.5).images
    ).abs().max() > 1e-3
    assert (found - expected).abs().max() < 2e-5
    with pytest.raises(ValueError, match="needs the picture encoder"):
        drawn(pipe, condition, [Semantica(adapter=adapter)])


def test_an_adapter_of_another_text_is_refused(tmp_path):
    unet = sd_pipeline().unet
    adapter = new_adapter(unet, 16)
    other = ImageAdapter(adapter.config.sites, 2 * unet.config.cross_attention_dim, 16)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="whose text is 64 wide, not 32"):
        load_adapter(tmp_path / "other", unet)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm++", "euler", "heun", "unipc"])
def test_other_schedulers_follow_the_models_schedule(pipe, name):
    """`from_config` alone gives them other betas and an epsilon that the model does not say."""
    own = pipe.scheduler
    other = make_scheduler(pipe, name)
    torch.testing.assert_close(other.alphas_cumprod, own.alphas_cumprod, atol=2e-6, rtol=1e-3)
    assert other.config.prediction_type == "v_prediction"
    assert other.config.timestep_spacing == own.config.timestep_spacing
    images = drawn(pipe, RED, [Semantica()], steps=6, scheduler=other).images
    assert torch.isfinite(images).all()


def test_the_built_in_model_draws_the_page_of_its_reference():
    """The judge never saw it; a picture drawn after another reference has another background."""
    plans = [scenes.scene(number, "test") for number in range(8)]
    pages = [scenes.episode(plan.number, 2, "test")[0] for plan in plans]
    conditions, _ = scenes.batch(pages, 32)
    references = [Condition(image=Reference(to_image(p / 2 + 0.5))) for p in conditions]
    images = drawn(load("scenes-semantica"), references, [Semantica()], range(8), 20).images
    found = see(load_judge(), images).classes
    grounds = torch.tensor([scenes.BACKGROUNDS[p.background] for p in pages]) / 255
    kept = same = 0
    for image, classes, page, ground in zip(images, found, pages, grounds, strict=True):
        free = image[:, torch.from_numpy(classes == 0)].median(1).values
        same += bool((free - ground).abs().max() < 0.1)
        objects = {scenes.CLASSES[i - 1] for i in np.unique(classes[classes > 0])}
        kept += bool({o.split()[0] for o in objects} & {t.colour for t in page.things})
    assert same >= 7 and kept >= 7, (same, kept)
