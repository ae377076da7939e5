"""A perturbed branch shares the rows of the conditional one until its first edit, and no longer."""

import contextlib

import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline
from diffusers.hooks import FirstBlockCacheConfig
from PIL import Image

import guidekit
import tiny
from guidekit import Branch, Condition, FeatureRead, Guidance, Sampling, Segment, box_mask
from guidekit.backbones.base import denoiser_of
from guidekit.backbones.denoiser import Denoiser
from guidekit.backbones.forks import fork_blocks
from guidekit.blocks import repeated_rows
from guidekit.testing import miniatures
from guidekit.testing.conditioners import control_net
from guidekit_autoguidance import Autoguidance
from guidekit_pag import PerturbedAttention
from guidekit_pww import PaintWithWords
from guidekit_seg import SmoothedEnergy
from guidekit_slg import SkipLayer

RED = Condition(
    "a red circle on a white ground", segments=(Segment("red circle", box_mask((0, 0, 0.5, 1))),)
)


@pytest.fixture(scope="module")
def wide():
    return tiny.sd_pipeline().to(torch.float64)


@contextlib.contextmanager
def rows_of(model):
    """The rows of every call of the first and of the last block of a model."""
    seen = {"first": [], "last": []}

    def counted(name):
        def hook(_, args, kwargs, __):
            seen[name].append(len(kwargs.get("hidden_states", args[0] if args else None)))

        return hook

    names = fork_blocks(model)
    hooks = [
        model.get_submodule(name).register_forward_hook(counted(place), with_kwargs=True)
        for place, name in (("first", names[0]), ("last", names[-1]))
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def drawn(pipe, *guidances, cfg=5.0, seeds=(3, 4), **options):
    """The latents, and the rows that the first and the last block saw in each call."""
    with rows_of(denoiser_of(pipe)) as seen:
        run = Sampling(pipe, RED, guidances, seeds=seeds, steps=3, cfg=cfg, **options).finish()
    return run.latents, {name: sorted(set(rows)) for name, rows in seen.items()}


def unforked(monkeypatch, pipe, *guidances, **options):
    """The same with rows of their own for all branches from the start."""
    with monkeypatch.context() as patch:
        patch.setattr(Denoiser, "fork_blocks", [])
        latents, rows = drawn(pipe, *guidances, **options)
    assert rows["first"] == rows["last"]
    return latents


@pytest.mark.parametrize("cfg", [1.0, 5.0])
@pytest.mark.parametrize(
    "guidances",
    [
        (PerturbedAttention(),),
        (SmoothedEnergy(),),
        (SkipLayer(sites=("mid_block.*.transformer_blocks.*",), start=0.0, stop=1.0),),
        (PerturbedAttention(), SmoothedEnergy()),
        (PerturbedAttention(stop=0.5),),
    ],
    ids=lambda value: "+".join(type(g).__name__ for g in value),
)
def test_rows_are_shared_until_the_first_edit(monkeypatch, wide, guidances, cfg):
    latents, rows = drawn(wide, *guidances, cfg=cfg)
    own = 2 if cfg == 1.0 else 4
    ends = guidances[0].stop < 1
    assert rows["first"] == [own]
    assert rows["last"] == [own] * ends + [own + 2 * len(guidances)]
    expected = unforked(monkeypatch, wide, *guidances, cfg=cfg)
    assert (latents - expected).abs().max() < 1e-12


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
@pytest.mark.parametrize("kind", [PerturbedAttention, SkipLayer])
def test_other_families_share_rows_too(monkeypatch, family, kind):
    """Skipped layers are blocks at whose entry rows join; Flux has no null branch."""
    pipe = getattr(miniatures, f"{family}_pipeline")().to(torch.float64)
    guidance, cfg = kind(start=0.0, stop=1.0), 1.0 if family == "flux" else 5.0
    latents, rows = drawn(pipe, guidance, cfg=cfg)
    own = 2 if family == "flux" else 4
    assert rows == {"first": [own], "last": [own + 2]}
    assert (latents - unforked(monkeypatch, pipe, guidance, cfg=cfg)).abs().max() < 1e-12


class Some(PerturbedAttention):
    """PAG of the second image alone."""

    def acts_on(self, step):
        return torch.tensor([False, True])


class Between(PerturbedAttention):
    """PAG with a branch of other words after its own."""

    def branches(self, step, branches):
        found = super().branches(step, branches)
        other = Branch("other", ["a blue square"] * len(step.run.seeds), group="other")
        return [*found, other]


@pytest.mark.parametrize(
    "guidances",
    [
        (PerturbedAttention(), SkipLayer(sites=("up_blocks.1.*.transformer_blocks.*",), start=0.0)),
        (Some(),),
        (Between(), SmoothedEnergy()),
    ],
    ids=["other first blocks", "some of the images", "another branch between"],
)
def test_late_branches_of_every_kind_are_as_without_sharing(monkeypatch, wide, guidances):
    latents, _ = drawn(wide, *guidances)
    assert (latents - unforked(monkeypatch, wide, *guidances)).abs().max() < 1e-12


@pytest.mark.parametrize("control", [False, True])
def test_an_attached_pipeline_shares_rows_unless_a_control_adds_something(monkeypatch, control):
    pipe, given = miniatures.sd_pipeline(), {}
    if control:
        net, image = control_net(pipe), Image.new("RGB", (32, 32), "red")
        pipe, given = (
            StableDiffusionControlNetPipeline(**pipe.components, controlnet=net),
            {"image": image},
        )

    def attached():
        generator = [torch.Generator().manual_seed(5)]
        with rows_of(pipe.unet) as seen, guidekit.attach(pipe, [PerturbedAttention()]):
            out = pipe(
                RED.prompt,
                num_inference_steps=3,
                generator=generator,
                output_type="latent",
                **given,
            )
        return out.images, {name: sorted(set(rows)) for name, rows in seen.items()}

    latents, rows = attached()
    monkeypatch.setattr(Denoiser, "fork_blocks", [])
    expected, _ = attached()
    assert (3 in rows["first"]) == control
    assert 3 in rows["last"]
    assert (latents - expected).abs().max() < 1e-5


def test_a_cache_of_blocks_gets_all_rows_from_the_start(monkeypatch):
    """It takes the output of one block from that of another."""
    pipe = miniatures.flux_pipeline()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    _, rows = drawn(pipe, PerturbedAttention(), cfg=1.0)
    assert rows["first"] == [4]


def test_masks_of_adapters_are_not_taken_for_rows():
    masks = torch.ones(2, 1, 8, 8)
    given = {"hidden_states": torch.zeros(2, 3), "kwargs": {"ip_adapter_masks": masks}}
    found = repeated_rows(given, 2, lambda x: torch.cat([x, x[1:]]))
    assert len(found["hidden_states"]) == 3
    assert found["kwargs"]["ip_adapter_masks"] is masks


@pytest.mark.parametrize(
    "guidances",
    [
        (Autoguidance(),),  # edits from the first block on
        (PaintWithWords(), PerturbedAttention()),  # the conditional branch is edited before
        (PerturbedAttention(sites=("down_blocks.0.*attn1",)),),
    ],
    ids=["edited everywhere", "cond edited first", "first block"],
)
def test_branches_that_differ_from_the_start_share_nothing(wide, guidances):
    _, rows = drawn(wide, *guidances)
    assert rows == {"first": [6], "last": [6]}


class Reads(Guidance):
    """Keeps the features of a block in the conditional branch, and whose rows it saw."""

    def __init__(self, site):
        self.site = site

    def prepare(self, run):
        self.read = run.read(self, FeatureRead((self.site,)))
        self.found = []

    def combine(self, step, outs, combined):
        self.found.append(step.evals["cond"].features(self.read)[self.site])
        return combined


@pytest.mark.parametrize(
    ("site", "rows"),
    [("down_blocks.0", {"first": [4], "last": [6]}), ("up_blocks.0", {"first": [4], "last": [6]})],
)
def test_features_are_those_of_the_branch_that_is_read(monkeypatch, wide, site, rows):
    """Also of a block at whose entry rows join the call."""
    seen = []
    for blocks in (Denoiser.fork_blocks, []):
        monkeypatch.setattr(Denoiser, "fork_blocks", blocks)
        with rows_of(wide.unet) as counted:
            run = Sampling(wide, RED, [PerturbedAttention(), Reads(site)], seeds=(3, 4), steps=2)
            seen.append(torch.stack([*run.finish().run.guidances[1].found]))
        if blocks:
            assert {name: sorted(set(n)) for name, n in counted.items()} == rows
    assert seen[0].shape[1] == 2
    assert (seen[0] - seen[1]).abs().max() < 1e-12


@pytest.mark.full
def test_a_compiled_denoiser_shares_nothing(wide):
    _, rows = drawn(wide, PerturbedAttention(), compile="eager")
    assert rows["first"] == rows["last"]
