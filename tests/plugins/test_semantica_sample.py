"""Semantica in the own loop and from the command line; adapters against diffusers' processors."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import semantica_tiny
from guidekit import Condition, Reference, Sampling, load
from guidekit.__main__ import main
from guidekit.backbones.loading import make_scheduler
from guidekit.errors import GuidekitError
from guidekit.evaluate.judge import load_judge, see
from guidekit.images import to_image
from guidekit.reads import FeatureRead
from guidekit.references import load_references
from guidekit.semantica import adapter_train
from guidekit.semantica.adapter import ImageAdapter, load_adapter, new_adapter
from guidekit.semantica.adapter_train import AdapterOptions, make
from guidekit.semantica.pipeline import denoise
from guidekit.testing.miniatures import sd_pipeline
from guidekit.train.loop import Loop, Options
from guidekit.worlds import scenes
from guidekit_semantica import Semantica


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
        (Condition(), [], {}, "follows an image: give --image"),
        (Condition("a fox", image=RED.image), [], {}, "reads no prompt"),
        (RED, [Semantica()], {"cfg": 2.0}, "cfg is 1 \\+ w"),
        (RED, [], {"height": 15}, "multiples of 2"),
    ],
)
def test_what_cannot_work_is_refused(pipe, condition, guidances, options, message):
    with pytest.raises(GuidekitError, match=message):
        drawn(pipe, condition, guidances, **options)


def test_a_picture_that_nothing_reads_is_refused():
    with pytest.raises(GuidekitError, match="reads no image; leave it out"):
        drawn(sd_pipeline(), Condition("red", image=RED.image))
    with pytest.raises(GuidekitError, match="needs an adapter"):
        drawn(sd_pipeline(), Condition("red", image=RED.image), [Semantica()])
    for w in (-1, float("nan"), float("inf")):
        with pytest.raises(GuidekitError, match=f"semantica.w is a finite .* at least 0, not {w}"):
            Semantica(w=w)


def test_a_model_without_condition_is_refused():
    pipe = semantica_tiny.pipeline(conditioning="none")
    with pytest.raises(GuidekitError, match="this model was trained without any"):
        drawn(pipe, RED, [Semantica()])


class Offloaded(torch.nn.Module):
    """A denoiser whose weights lie elsewhere until it is called."""

    device = torch.device("meta")

    def __init__(self, unet):
        super().__init__()
        self.unet, self.config, self.dtype = unet, unet.config, unet.dtype

    def forward(self, *args, **options):
        return self.unet(*args, **options)


def test_offloaded_weights(pipe, monkeypatch):
    """Noise is drawn where the model computes; its hooks are freed after the last step."""
    states = pipe.states(RED.image.pixels(16)[None])
    seed = lambda: torch.Generator().manual_seed(5)  # noqa: E731
    expected = denoise(pipe.unet, pipe.scheduler, states, 0.5, 2, seed())
    found = denoise(Offloaded(pipe.unet), pipe.scheduler, states, 0.5, 2, seed())
    assert torch.equal(found, expected)
    other, order = semantica_tiny.pipeline(), []
    other.enable_model_cpu_offload(device="cpu")
    free = other.maybe_free_model_hooks
    monkeypatch.setattr(other, "maybe_free_model_hooks", lambda: order.append("free") or free())
    for name in ("encoder", "unet"):
        getattr(other, name).register_forward_hook(lambda *_, name=name: order.append(name))
    images = other(RED.image.picture, 0.5, 2, seed(), "pt").images
    assert torch.equal(images, expected)
    assert order == ["encoder", "unet", "unet", "free"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An adapter trained for a few steps on tiny scenes, and its losses."""
    root = tmp_path_factory.mktemp("adapter")
    sd_pipeline().save_pretrained(root / "sd")
    semantica_tiny.encoder().save_pretrained(root / "encoder")
    options = AdapterOptions(
        backbone=str(root / "sd"),
        encoder=str(root / "encoder"),
        pages=6,
        per_page=2,
        low=-2.0,
        high=2.0,
    )
    loop = Loop(
        make(options, root, 64),
        Options(steps=4, batch=4, log_every=1, warmup=1),
        root / "run",
        quiet=True,
    )
    before = [p.clone() for p in loop.task.pipeline.unet.parameters()]
    loop.run()
    loop.export(root / "model")
    after = loop.task.pipeline.unet.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return root


@pytest.mark.full
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
    assert (guided.images - plain).abs().max() > 1e-3
    assert not guided.account.notes
    assert (drawn(pipe, blue, [follow]).images - guided.images).abs().max() > 1e-4
    alone = drawn(pipe, red, [follow], seeds=[6]).images
    assert (alone[0] - guided.images[1]).abs().max() < 1e-4
    assert torch.equal(drawn(pipe, red, [follow]).images, guided.images)
    wrong = sd_pipeline().unet.__class__(**dict(pipe.unet.config) | {"layers_per_block": 2})
    with pytest.raises(GuidekitError, match="other attention sites"):
        load_adapter(trained / "strong", wrong)


@pytest.mark.full
def test_the_backbone_goes_to_the_processes_own_device(trained, monkeypatch):
    """ "meta" stands for the second GPU; load would take the first."""
    monkeypatch.setattr(
        adapter_train, "PartialState", lambda: SimpleNamespace(device=torch.device("meta"))
    )
    loaded = []
    monkeypatch.setattr(adapter_train, "load", lambda *args: loaded.append(args[1]) or load(*args))
    options = AdapterOptions(
        backbone=str(trained / "sd"),
        encoder=str(trained / "encoder"),
        pages=6,
        per_page=2,
        low=-2.0,
        high=2.0,
    )
    task = make(options, trained, 64)
    assert loaded == ["cpu"]
    assert task.pipeline.device.type == "meta"
    assert {p.device.type for p in task.net.parameters()} == {"cpu"}


def test_adapters_are_trained_for_stable_diffusion_alone(tmp_path):
    options = AdapterOptions(backbone="digits-ddpm")
    with pytest.raises(
        GuidekitError, match="digits-ddpm is a DDPMPipeline; adapters are trained for"
    ):
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
    assert Path("o/reference.png").exists()
    assert Path("o/unguided/1.png").exists()
    assert "reference.png" in Path("o/index.html").read_text()
    again = CliRunner().invoke(main, ["sample", "--config", "o/run.json", "--out", "p"])
    assert again.exit_code == 0, again.output
    assert Image.open("o/1.png").tobytes() == Image.open("p/1.png").tobytes()
    for name in ("fish/a.png", "bird/b.png"):
        Path("classes", name).parent.mkdir(parents=True)
        picture((name[0] == "f" and "red") or "blue").save(Path("classes", name))
    folder = ["--image-folder", "classes", "--per-image", "3", "--batch", "4"]
    many = CliRunner().invoke(main, [*args, *folder, "--out", "set"])
    assert many.exit_code == 0, many.output
    files = sorted(str(p.relative_to("set")) for p in Path("set").glob("*/*.png"))
    assert files == [f"bird/{i}.png" for i in (0, 1, 2)] + [f"fish/{i}.png" for i in (3, 4, 5)]
    run = json.loads(Path("set/run.json").read_text())
    assert run["record"]["finished"] == run["sample"]["seeds"] == list(range(6))
    assert json.loads(Image.open("set/fish/4.png").text["guidekit"])["sample"]["seeds"] == [4]
    assert run["record"]["targets"]["4"]["path"] == "fish/4.png"
    assert {"fish/4.png", "../classes/fish/a.png"} <= set(
        re.findall(r'src="([^"]*)"', Path("set/index.html").read_text())
    )
    assert not Path("set/unguided").exists()
    for wrong, message in (
        (["--image", "none.png"], "no such file"),
        (["--per-image", "2"], "needs image_folder"),
        (["--image", "ref.png", *folder], "not both"),
        ([*folder, "--seeds", "7,3,100"], "give the first alone, --seeds 7"),
        ([*folder, "--compare"], "--compare is not for --image-folder"),
        (["--image", "ref.png", "--set", "semantica.w=inf"], "semantica.w is a finite"),
        ([], "follows an image"),
    ):
        refused = CliRunner().invoke(main, [*args, *wrong])
        assert refused.exit_code == 2, refused.output
        assert message in refused.output, refused.output


def test_a_transparent_reference_is_saved_as_the_model_sees_it(pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe.save_pretrained("model")
    Image.new("RGBA", (20, 16)).save("clear.png")
    words = "sample --model model --image clear.png --steps 1 --seeds 0 --out o"
    result = CliRunner().invoke(main, words.split())
    assert result.exit_code == 0, result.output
    saved = Image.open("o/reference.png")
    assert saved.size == (16, 16)
    assert saved.getextrema() == ((255, 255),) * 3


def test_folders_of_references(tmp_path):
    for name in ("a/1.png", "b.png", "a/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture("red").save(tmp_path / name)
    with pytest.raises(GuidekitError, match="two images for 'a'"):
        load_references(tmp_path)
    (tmp_path / "a/2.png").unlink()
    picture("blue").resize((3000, 1500)).save(tmp_path / "b.png")
    found = load_references(tmp_path)
    assert found["b"].picture.size == (1024, 512)
    assert list(found) == ["a", "b"]
    assert found["b"].pixels(8).shape == (3, 8, 8)
    with pytest.raises(GuidekitError, match="no .jpg"):
        load_references(tmp_path / "nothing")


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


@pytest.mark.full
def test_the_built_in_model_draws_the_page_of_its_reference():
    """The judge never saw it; an image drawn after another reference has another background."""
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
    assert same >= 7, (same, kept)
    assert kept >= 7, (same, kept)
