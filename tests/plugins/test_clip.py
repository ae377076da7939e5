"""CLIP guidance: its energies, what it needs of the backbone, the length of its push."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from guidekit import Condition, Guidance, Sampling, Segment, box_mask, load
from guidekit.backbones.loading import make_scheduler
from guidekit.backbones.schedulers import schedulers_for
from guidekit.errors import GuidekitError
from guidekit.evaluate.judge import FOUND, load_judge, see
from guidekit.noisy_clip.miniature import random_clip, random_encoder
from guidekit.references import read_references
from guidekit.registry import Registry
from guidekit.testing import run_check
from guidekit.testing.miniatures import ddpm_pipeline, sd3_pipeline, sd_pipeline
from guidekit.worlds.scenes import CLASSES
from guidekit_clip import Clip, gram, shifted, split, style, weighted
from guidekit_zest import Zest

NOTHING = Condition()
RED = {"encoder": "random", "text": "a red circle"}
SCENE = {"encoder": "random", "image": (Path("scene-3"),)}
WHOLE = {"views": 0}


@pytest.fixture(scope="module")
def pipe():
    return ddpm_pipeline()


def first_step(pipe, guidance, seeds=(0, 1), condition=NOTHING, scheduler="ddpm", **options):
    """The first guided step of a run of four."""
    options = {"steps": 4, "scheduler": make_scheduler(pipe, scheduler)} | options
    return next(iter(Sampling(pipe, condition, [guidance], seeds=seeds, **options)))


def energies(step):
    return torch.tensor(step.run.account.rows[0]["energy"])


class Styled(Clip):
    """Style and a negative text (2026)."""

    @classmethod
    def example(cls):
        return cls(**SCENE, style=1e4, negative="a blue square", content=0.0)


class OnX0(Clip):
    """The clean estimate in two views (2026)."""

    @classmethod
    def example(cls):
        return cls(**SCENE, text="a red circle", on="x0", cutouts=2, structure=1.0)


@pytest.mark.full
@pytest.mark.parametrize("check", ["energy", "batch"])
@pytest.mark.parametrize("cls", [Styled, OnX0])
def test_other_forms_hold_too(cls, check):
    assert run_check(cls, check) is None


def test_energy_of_texts_is_minus_their_weighted_cosines(pipe):
    texts = {"text": "a red circle@0.5 | a green square", "negative": "blue"}
    guidance = Clip(encoder="random", **texts, **WHOLE)
    step = first_step(pipe, guidance)
    encoder, z = random_encoder(3), step.z
    seen = encoder.at(z, step.level).embedding
    words = encoder.texts(["a red circle", "a green square", "blue"])
    cosines = F.cosine_similarity(seen[:, None], words[None], dim=-1)
    expected = -120 * (cosines @ torch.tensor([0.5, 1.0, -1.0]))
    torch.testing.assert_close(energies(step), expected, rtol=1e-4, atol=1e-4)


def test_views_are_averaged_and_each_picture_has_its_own(pipe):
    step = first_step(pipe, Clip(**RED, views=3))
    encoder, level, z = random_encoder(3), step.level, step.z
    word = encoder.texts(["a red circle"])
    places = torch.special.ndtr(step.run.noise((3, 3), 0, 0, "clip.views"))
    assert not torch.equal(places[0], places[1])
    seen = [encoder.at(shifted(z, place), level).embedding for place in places.unbind(1)]
    expected = -120 * sum(F.cosine_similarity(view, word) for view in seen) / 3
    torch.testing.assert_close(energies(step), expected, rtol=1e-4, atol=1e-4)
    assert (energies(step) - energies(first_step(pipe, Clip(**RED, **WHOLE)))).abs().max() > 1e-3


def test_a_view_is_moved_by_whole_pixels_and_may_be_mirrored():
    x = torch.arange(256.0).reshape(1, 1, 16, 16).expand(3, 1, 16, 16)
    places = torch.tensor([[0.5, 0.5, 0.9], [0.5, 0.5, 0.1], [1.0, 0.0, 0.9]])
    same, mirrored, moved = shifted(x, places)
    assert torch.equal(same, x[0])
    assert torch.equal(mirrored, x[0].flip(-1))
    assert torch.equal(moved[:, :14, 2:], x[0][:, 2:, :14])


def test_references_are_noised_to_the_level_of_z_for_each_picture(pipe):
    guidance = Clip(**SCENE, **WHOLE, structure=3.0, stages=(1,))
    step = first_step(pipe, guidance)
    encoder, level = random_encoder(3), step.level
    reference = read_references([Path("scene-3")], (16, 16))
    noisy = level.a * reference + level.s * step.noise("clip.0")
    seen, target = (encoder.at(x, level, [1]) for x in (step.z, noisy))
    cosine = F.cosine_similarity(seen.embedding, target.embedding)
    distance = (seen.stages[0] - target.stages[0]).pow(2).mean((1, 2, 3))
    torch.testing.assert_close(energies(step), -100 * cosine + 3 * distance, rtol=1e-4, atol=1e-4)


def test_gram_matrices_are_of_one_picture_each():
    maps = torch.randn(3, 5, 4, 4)
    whole = gram(maps)
    for i in range(3):
        torch.testing.assert_close(gram(maps[i : i + 1])[0], whole[i])
    expected = torch.einsum("bchw,bdhw->bcd", maps, maps) / (5 * 16)
    torch.testing.assert_close(whole, expected)
    assert style([maps], [maps]).abs().max() == 0
    assert style([maps.half()], [maps.half().flip(0)]).dtype == torch.float32


def test_texts_and_images_may_differ_from_picture_to_picture(pipe):
    texts = [["a red circle"], ["a blue square", "a green circle"]]
    images = torch.randn(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    both = first_step(pipe, Clip(encoder="random").towards(texts, images))
    for i in range(2):
        guidance = Clip(encoder="random").towards(texts[i : i + 1], images[i : i + 1])
        alone = first_step(pipe, guidance, seeds=(i,))
        torch.testing.assert_close(energies(alone)[0], energies(both)[i], rtol=1e-4, atol=1e-4)
    own = [
        Condition(targets={"clip": {"texts": t, "images": i}})
        for t, i in zip(texts, images, strict=True)
    ]
    given = first_step(pipe, Clip(encoder="random"), condition=own)
    assert torch.equal(energies(given), energies(both))
    with pytest.raises(GuidekitError, match="texts of 2 images for 1"):
        first_step(pipe, Clip(encoder="random").towards(texts), seeds=(0,))


class Counted:
    """Counts the denoiser calls that keep a graph."""

    def __init__(self, model):
        self.calls = self.graphs = 0
        self.handle = model.register_forward_hook(self)

    def __call__(self, module, args, output):
        out = output[0] if isinstance(output, tuple) else output.sample
        self.calls += 1
        self.graphs += out.requires_grad


@pytest.mark.parametrize(("on", "graphs"), [("z", 0), ("x0", 4)])
def test_only_the_clean_estimate_needs_a_graph_of_the_backbone(pipe, on, graphs):
    counted = Counted(pipe.unet)
    try:
        Sampling(pipe, NOTHING, [Clip(**RED, on=on)], steps=4).finish()
    finally:
        counted.handle.remove()
    assert (counted.calls, counted.graphs) == (4, graphs)


class Measured(Clip):
    """Keeps the gradient and steps copies of the scheduler with and without the push."""

    def push(self, step, grad):
        self.grad = grad
        return super().push(step, grad)

    def edit_prediction(self, step, out):
        samples = []
        for chosen in (out, step.out.detach()):
            scheduler = make_scheduler(step.run.denoiser.pipeline, "ddpm")
            scheduler.set_timesteps(step.n)
            if step.variance is not None:
                chosen = torch.cat([chosen, step.variance], 1)
            generator = torch.Generator().manual_seed(0)
            stepped = scheduler.step(chosen, step.timestep, step.z, generator=generator)
            samples.append(stepped.prev_sample)
        self.moved = samples[0] - samples[1]
        return out


@pytest.mark.parametrize("learned", [False, True])
def test_in_the_units_of_the_paper_the_mean_moves_by_variance_times_gradient(learned):
    pipe = ddpm_pipeline(learned)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, clip_sample=False)
    guidance = Measured(**RED, scale=2.0)
    step = first_step(pipe, guidance)
    (guidance,), scheduler = step.run.guidances, step.run.scheduler
    predicted = step.variance if learned else None
    variance = scheduler._get_variance(int(step.timestep), predicted)
    if learned:  # "learned_range": the log of the variance
        variance = variance.exp()
    torch.testing.assert_close(guidance.moved, -2 * variance * guidance.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["ddpm", "euler", "dpm++"])
def test_in_units_of_noise_the_push_has_the_asked_length(pipe, name):
    step = first_step(pipe, Clip(**RED, units="noise", scale=0.3), scheduler=name)
    before, after = (step.level.eps(out, step.z) for out in (step.out, step.prediction))
    lengths = (after - before).flatten(1).norm(dim=1) / math.sqrt(step.z[0].numel())
    torch.testing.assert_close(lengths, torch.full((2,), 0.3), rtol=1e-3, atol=1e-4)


def test_a_picture_without_text_is_drawn_as_it_is(pipe):
    """A gradient of zero has no direction; its row stays finite and unmoved."""
    guidance = Clip(encoder="random", units="noise", scale=0.3).towards([["a red circle"], []])
    step = first_step(pipe, guidance)
    moved = (step.prediction - step.out).abs().amax((1, 2, 3))
    assert step.prediction.isfinite().all()
    assert moved[0] > 1e-3
    assert moved[1] == 0


def check_steered(pipe, name):
    scheduler = make_scheduler(pipe, name)
    options = {"seeds": (0,), "steps": 4, "scheduler": scheduler}
    guidance = Clip(**RED, units="noise", scale=0.2)
    guided = Sampling(pipe, NOTHING, [guidance], **options).finish()
    plain = Sampling(pipe, NOTHING, **options).finish()
    assert guided.account.acted("clip")
    assert guided.latents.isfinite().all()
    assert not torch.equal(guided.latents, plain.latents)


@pytest.mark.parametrize("name", schedulers_for(ddpm_pipeline().scheduler))
def test_every_scheduler_is_steered(pipe, name):
    check_steered(pipe, name)


@pytest.fixture(scope="module")
def flow_pipe():
    return sd3_pipeline()


@pytest.mark.parametrize("name", schedulers_for(sd3_pipeline().scheduler))
def test_every_flow_scheduler_is_steered(flow_pipe, name):
    check_steered(flow_pipe, name)


def test_without_noise_the_score_takes_over_and_the_account_says_so(pipe):
    drawn = Sampling(
        pipe, NOTHING, [Clip(**RED)], steps=3, scheduler=make_scheduler(pipe, "ddim")
    ).finish()
    assert any("pushed by the score" in note for note in drawn.account.notes)


def test_it_goes_with_zest_and_classifier_free_guidance():
    pipe = sd_pipeline()
    segment = Segment("red circle", box_mask((0, 0, 0.5, 1)))
    condition = Condition("a red circle on white", "blue", segments=(segment,))
    guidances = [Zest(stop=1.0), Clip(encoder="random")]  # the text is the prompt
    drawn = Sampling(pipe, condition, guidances, steps=3, cfg=4.0).finish()
    assert drawn.account.acted("zest")
    assert drawn.account.acted("clip")
    assert {row["plugin"] for row in drawn.account.rows} == {"zest", "clip"}


def test_any_open_clip_folder_reads_the_clean_estimate(pipe, tmp_path):
    random_clip().save(tmp_path)
    guidance = Registry().make_guidance(
        "clip", {"encoder": str(tmp_path), "on": "x0", "text": "a red circle"}
    )
    step = first_step(pipe, guidance)
    assert (step.prediction - step.out).abs().max() > 0


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"encoder": "random"}, "nothing to pull to"),
        ({"encoder": "nowhere", "text": "a"}, "no noise-aware CLIP 'nowhere'"),
        ({**RED, "structure": 1.0}, "clip.structure and style need clip.image"),
        ({**SCENE, "content": 0.0}, "content, structure, style are 0"),
        ({**SCENE, "structure": 1.0, "stages": (9,)}, "the encoder has 0 to 1"),
        ({"encoder": "random", "image": (Path("none.png"),)}, "no such file"),
    ],
)
def test_what_cannot_act_says_so(pipe, fields, says):
    with pytest.raises(GuidekitError, match=says):
        first_step(pipe, Clip(**fields))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"units": "metres"}, "paper, noise"),
        ({"on": "v"}, "z, x0"),
        ({"cutouts": 2}, "needs clip.on=x0"),
        ({"views": -1}, "views and clip.cutouts are at least 0"),
    ],
)
def test_wrong_options_name_the_right_ones(fields, says):
    with pytest.raises(GuidekitError, match=says):
        Clip(**fields)


def test_an_encoder_of_pixels_cannot_read_latents(tmp_path):
    random_encoder(3).save_pretrained(tmp_path)
    with pytest.raises(
        GuidekitError, match="reads pixels of 3 channels, and here are latents of 4"
    ):
        first_step(sd_pipeline(), Clip(encoder=str(tmp_path), text="red"), scheduler="ddim")


def test_texts_carry_weights():
    assert [weighted(t) for t in split("a red circle@0.7 | b | c@home")] == [
        ("a red circle", 0.7),
        ("b", 1.0),
        ("c@home", 1.0),
    ]


def test_a_guidance_named_from_python_is_called_clip():
    assert Clip().name == "clip"
    assert isinstance(replace(Clip(), scale=2.0), Guidance)


@pytest.mark.full
def test_the_built_in_encoder_draws_what_the_text_says():
    pipe = load("scenes-ddpm")
    options = {"seeds": range(8), "steps": 25, "scheduler": make_scheduler(pipe, "ddpm")}
    guidance = Clip(text="a cyan circle on a white background", units="noise", scale=0.2)
    cyan = [i + 1 for i, name in enumerate(CLASSES) if name.startswith("cyan ")]
    objects, grounds = [], []
    for guidances in ([], [guidance]):
        images = Sampling(pipe, NOTHING, guidances, **options).finish().images
        found = see(load_judge(), images).classes
        objects.append((np.isin(found, cyan).mean((1, 2)) >= FOUND).sum())
        free = [image[:, torch.from_numpy(f == 0)] for image, f in zip(images, found, strict=True)]
        grounds.append(sum(bool((pixels.median(1).values > 0.8).all()) for pixels in free))
    assert objects[1] >= 6 > 3 >= objects[0], objects
    assert grounds[1] >= 6 > 3 >= grounds[0], grounds
