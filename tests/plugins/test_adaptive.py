"""Adaptive guidance, and branches of some images only."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import guidekit
import tiny
from guidekit import Condition, Guidance, Sampling
from guidekit.errors import GuidekitError
from guidekit.testing.miniatures import sd3_pipeline
from guidekit_adaptive import Adaptive

PROMPTS = ["a red circle", "a blue square on white"]


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd_pipeline()


def sampling(pipe, *guidances, prompts=PROMPTS, **options):
    given = {"seeds": range(len(prompts)), "steps": 4, "cfg": 5.0, **options}
    return Sampling(pipe, [Condition(p) for p in prompts], guidances, **given)


@dataclass(kw_only=True)
class Only(Guidance):
    """The null branch of chosen images."""

    images: tuple[bool, ...] = (True, False)

    def branches(self, step, branches):
        for branch in branches:
            if branch.name == "null":
                branch.images = torch.tensor(self.images)
        return branches


@pytest.mark.parametrize(
    "build",
    [
        tiny.sd_pipeline,
        pytest.param(tiny.sdxl_pipeline, marks=pytest.mark.full),
        pytest.param(sd3_pipeline, marks=pytest.mark.full),
    ],
)
def test_the_others_are_as_without_the_branch(build):
    pipe = build()
    ours = sampling(pipe, Only()).finish()
    both, cond = sampling(pipe).finish(), sampling(pipe, cfg=1.0).finish()
    torch.testing.assert_close(ours.latents[0], both.latents[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.latents[1], cond.latents[1], rtol=1e-4, atol=1e-4)
    assert ours.account.edits == {"only": 4}
    none = sampling(pipe, Only(images=(False, False))).finish()
    assert torch.equal(none.latents, cond.latents)
    assert none.engine.evaluator.count == 4


def rows(pipe, *guidances):
    """Rows of every denoiser call."""
    found = []
    handle = pipe.unet.register_forward_pre_hook(lambda m, args: found.append(len(args[0])))
    try:
        drawn = sampling(pipe, *guidances).finish()
    finally:
        handle.remove()
    return found, drawn


def test_each_image_ends_where_its_own_predictions_agree(pipe):
    steps = list(sampling(pipe))
    cosines = torch.stack(
        [F.cosine_similarity(*(s.evals[n].out.flatten(1) for n in ("cond", "null"))) for s in steps]
    )
    first = cosines[0]
    threshold = float(first.mean())  # the first step decides for one of them
    found, drawn = rows(pipe, Adaptive(threshold=threshold))
    assert found[:2] == [4, 3]
    assert first.max() - first.min() > 1e-5
    early = int(first.argmax())
    ended = sampling(pipe, Only(images=tuple(i != early for i in range(2)), start=0.2)).finish()
    torch.testing.assert_close(drawn.latents[early], ended.latents[early], rtol=1e-4, atol=1e-4)
    assert rows(pipe, Adaptive(threshold=1.0))[0] == [4] * 4


def test_energies_reach_through_the_rows(pipe):
    @dataclass(kw_only=True)
    class Bright(Guidance):
        """Pulls x0 up."""

        scale: float = 3.0

        def energy(self, step):
            return -step.x0.flatten(1).mean(1)

    ours = sampling(pipe, Only(), Bright(), calls={"null+cond*": "split"}).finish()
    cond = sampling(pipe, Bright(), cfg=1.0).finish()
    torch.testing.assert_close(ours.latents[1], cond.latents[1], rtol=1e-4, atol=1e-4)


def test_in_a_pipeline(pipe):
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    with guidekit.attach(pipe, [Only()]):
        found = pipe(
            PROMPTS,
            num_inference_steps=4,
            guidance_scale=5.0,
            output_type="latent",
            generator=generators,
        ).images
    ours = sampling(pipe, Only()).finish().latents
    torch.testing.assert_close(found, ours, rtol=1e-4, atol=1e-4)


def test_wrong_masks_are_refused(pipe):
    with pytest.raises(GuidekitError, match=r"images \(3,\) of torch.bool; give one bool for each"):
        sampling(pipe, Only(images=(True,) * 3)).finish()
    wrong = Only()
    wrong.branches = lambda step, branches: [
        setattr(b, "images", torch.tensor([True, False])) or b for b in branches
    ]
    with pytest.raises(GuidekitError, match="the output of 'cond' stands in"):
        sampling(pipe, wrong).finish()
    with pytest.raises(GuidekitError, match="adaptive ends classifier-free guidance, and cfg is 1"):
        sampling(pipe, Adaptive(), cfg=1.0)
