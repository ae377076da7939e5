"""Self-guidance: its properties in closed form, and the first image of a group left alone."""

import pytest
import torch

import tiny
from guidekit import Condition, Sampling, Segment, average_maps, box_mask
from guidekit.errors import GuidekitError
from guidekit_self_guidance import SelfGuidance, centroid, soft_shape


def condition(box, group=None):
    return Condition("a red circle", segments=(Segment("circle", box_mask(box)),), group=group)


def test_properties_of_a_box():
    maps = torch.zeros(1, 1, 4, 8, dtype=torch.float64)
    maps[..., 1:3, 4:] = 3.0  # the right half of the middle rows
    assert centroid(maps)[0, 0].tolist() == pytest.approx([0.75, 0.5])
    shape = soft_shape(maps)
    assert torch.equal(shape, (maps > 0).double())
    assert shape.mean() == 0.25
    torch.testing.assert_close(soft_shape(7 * maps + 2), shape)


def run(guidance, conditions, seeds, **options):
    pipe = tiny.sd_pipeline()
    return Sampling(pipe, conditions, guidance, seeds=seeds, steps=2, cfg=5.0, **options)


def test_the_energy_is_the_distance_of_the_maps_from_the_mask():
    box = (0.5, 0.25, 1, 0.75)
    sampling = run([SelfGuidance(size=0.0, stop=0.4)], condition(box), [5])
    step = next(iter(sampling))
    own = sampling.guidances[0]
    maps = average_maps(step.cond.attention(own._maps))[0, 0]
    places = [
        (float(m), (x + 0.5) / 16, (y + 0.5) / 16)
        for y, line in enumerate(maps)
        for x, m in enumerate(line)
    ]
    mass = sum(m for m, _, _ in places)
    centre = [sum(m * at[i] for m, *at in places) / mass for i in (0, 1)]
    (row,) = sampling.account.rows
    wanted = (abs(centre[0] - 0.75) + abs(centre[1] - 0.5)) / 2  # from the middle of the box
    assert row["energy"] == pytest.approx([wanted], rel=1e-4)
    assert row["grad_norm"][0] > 0


def test_the_first_of_a_group_is_drawn_as_it_is_without():
    conditions = [condition((0, 0, 0.5, 1), "a"), condition((0.5, 0, 1, 1), "a")]
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).repeat(
        2, 1, 1, 1
    )
    guidance = SelfGuidance(shape=1.0, look=1.0, shape_of="first")
    guided = run([guidance], conditions, [5, 6], latents=latents).finish()
    bare = run([], conditions, [5, 6], latents=latents).finish()
    torch.testing.assert_close(guided.latents[0], bare.latents[0], rtol=1e-4, atol=1e-4)
    assert (guided.latents[1] - bare.latents[1]).abs().max() > 1e-2
    assert all(row["energy"][0] == 0 < row["energy"][1] for row in guided.account.rows)
    with pytest.raises(GuidekitError, match="every image is alone; use Condition.group"):
        run([guidance], conditions[:1], [5])


def test_an_image_of_fewer_segments_has_an_energy_too():
    two = Condition(
        "a red circle",
        segments=tuple(Segment(w, box_mask((0, 0, 0.5, 1))) for w in ("circle", "red")),
        group="a",
    )
    guidance = SelfGuidance(look=1.0, stop=0.4)
    sampling = run([guidance], [two, condition((0.5, 0, 1, 1), "a")], [5, 6])
    next(iter(sampling))
    (row,) = sampling.account.rows
    assert all(energy == energy for energy in row["energy"])  # no NaN
