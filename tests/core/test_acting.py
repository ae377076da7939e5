"""A guidance of some images: those are as with it alone, the others as without it, in float64."""

from dataclasses import dataclass

import pytest
import torch

import guidekit
import tiny
from guidekit import Branch, Condition, Guidance, GuidekitError, Segment
from guidekit.masks import box_mask
from guidekit_layout_guidance import LayoutGuidance
from guidekit_pag import PerturbedAttention
from guidekit_pww import PaintWithWords
from guidekit_slg import SkipLayer
from guidekit_zest import Zest

MINE = torch.tensor([True, False, True])
CONDITION = Condition("a red circle", segments=(Segment("red circle", box_mask((0, 0, 0.5, 1))),))


@dataclass(kw_only=True)
class Own(Guidance):
    """Every hook of rows; its push divides by the gradient, which is zero where it does not act."""

    def energy(self, step):
        return step.x0.square().flatten(1).sum(1)

    def push(self, step, grad):
        return step.move.score(-1e-2 * grad / grad.flatten(1).norm(dim=1)[:, None, None, None])

    def refine(self, step, z):
        return z * 1.01

    def edit_input(self, step, branch, x):
        return 1.01 * x

    def combine(self, step, outs, combined):
        return 1.02 * combined

    def edit_prediction(self, step, out):
        return out + 0.01

    def edit_sample(self, step, z):
        return z.add_(0.01)  # in place


@dataclass(kw_only=True)
class Skipped(Guidance):
    """A block of the conditional branch that does nothing."""

    def prepare(self, run):
        run.tap_blocks(self, ("mid_block.attentions.0.transformer_blocks.0",))

    def edit_block(self, step, branch, call):
        return call.skip()


def partly(cls):
    """The class for the images of MINE alone."""

    @dataclass(kw_only=True)
    class Partly(cls):
        def acts_on(self, step):
            return MINE

    return Partly


def drawn(guidances, **options):
    pipe = tiny.sd_pipeline().to(dtype=torch.float64)
    options = {"seeds": [1, 2, 3], "steps": 2, "cfg": 3.0} | options
    return guidekit.sample(pipe, [CONDITION] * 3, guidances, **options).finish().latents


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (Own, {}),
        (Skipped, {}),
        (PaintWithWords, {"scale": 1.0}),
        pytest.param(Zest, {"stop": 1.0}, marks=pytest.mark.full),
        pytest.param(
            LayoutGuidance, {"stop": 1.0, "limit": 2, "until": 0.0}, marks=pytest.mark.full
        ),
        (PerturbedAttention, {"scale": 3.0}),
        (SkipLayer, {"scale": 3.0, "start": 0.0, "stop": 1.0}),
    ],
)
def test_other_images_are_as_without_it(cls, options):
    plain, whole = drawn([]), drawn([cls(**options)])
    found = drawn([partly(cls)(**options)])
    assert (found - plain)[~MINE].abs().max() < 1e-10
    assert (found - whole)[MINE].abs().max() < 1e-10
    assert (found - plain)[MINE].abs().amax((1, 2, 3)).min() > 1e-6


@pytest.mark.full
def test_maps_are_read_from_the_call_that_was_left_alone():
    """Zest reads the maps that Paint-with-Words has biased for some of the images."""
    zest = Zest(stop=1.0)
    plain, whole = drawn([zest]), drawn([PaintWithWords(scale=1.0), zest])
    found = drawn([partly(PaintWithWords)(scale=1.0), zest])
    assert (found - plain)[~MINE].abs().max() < 1e-10
    assert (found - whole)[MINE].abs().max() < 1e-10


@pytest.mark.full
def test_energies_of_one_rule_are_of_their_own_images():
    """Two that share a backward; an energy that is no number counts only where it acts."""

    @dataclass(kw_only=True)
    class Grows(Guidance):
        def energy(self, step):
            return -step.x0.square().flatten(1).sum(1)

    class Undefined(partly(Grows)):
        def energy(self, step):
            return super().energy(step) / MINE

    both, one = drawn([Grows(scale=0.1), Grows(scale=0.2)]), drawn([Grows(scale=0.1)])
    found = drawn([Grows(scale=0.1), partly(Grows)(scale=0.2)])
    assert (found - one)[~MINE].abs().max() < 1e-10
    assert (found - both)[MINE].abs().max() < 1e-10
    plain = drawn([])
    assert (drawn([Undefined(scale=0.1)]) - plain)[~MINE].abs().max() < 1e-10


def test_what_is_of_all_images_is_refused():
    class Repeats(partly(Own)):
        def repeats(self, step):
            return 2

    class Main(partly(Guidance)):
        def branches(self, step, branches):
            return [*branches, Branch("more", branches[0].prompts, weight=1.0)]

    class Wrong(Own):
        def acts_on(self, step):
            return torch.ones(2, dtype=torch.bool)

    for guidance, message in ((Repeats(), "its repeats is of all"),
                              (Main(), "add branches of another group"),
                              (Wrong(), "one bool for each of 3 images")):  # fmt: skip
        with pytest.raises(GuidekitError, match=message):
            drawn([guidance])


@pytest.mark.filterwarnings("ignore:.*never acted")
def test_one_of_no_images_changes_nothing():
    class Nobody(Own):
        def acts_on(self, step):
            return torch.zeros(3, dtype=torch.bool)

    assert torch.equal(drawn([Nobody()]), drawn([]))


def test_a_branch_that_was_there_stays_as_it_was():
    """A hook that writes into one would change it for all images."""

    class Turned(partly(Guidance)):
        def branches(self, step, branches):
            branches[-1].weight = 1.5
            return branches

    with pytest.raises(GuidekitError, match="changes branches that are there"):
        drawn([Turned()])


def test_what_it_makes_of_another_group_is_of_its_images():
    """Two that add to the output what a group is: as the first leaves it, and twice that."""

    class Group(Guidance):
        def branches(self, step, branches):
            return [*branches, Branch("more", branches[-1].prompts, group="more")]

        def edit_prediction(self, step, out):
            return out + 0.1 * step.groups["more"]

    class Doubled(Guidance):
        def combine(self, step, outs, combined):
            step.groups["more"] = 2 * step.groups["more"]
            return combined

    plain, whole = drawn([Group()]), drawn([Group(), Doubled()])
    found = drawn([Group(), partly(Doubled)()])
    assert (found - plain)[~MINE].abs().max() < 1e-10
    assert (found - whole)[MINE].abs().max() < 1e-10
    assert (whole - plain).abs().max() > 1e-6


def test_two_of_some_images_at_one_site_are_refused_in_words():
    both = [partly(PaintWithWords)(scale=1.0), partly(PaintWithWords)(scale=0.5)]
    with pytest.raises(GuidekitError, match="one such plugin may edit a site, named after all"):
        drawn(both)
