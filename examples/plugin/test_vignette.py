"""Vignette: guidekit's own checks, and what only this plugin promises."""

import pytest

from guidekit import Condition, GuidekitError, Sampling
from guidekit.testing import check_guidance, sd_pipeline
from guidekit_vignette import Vignette, corners


def test_it_keeps_what_guidekit_asks_of_every_guidance():
    check_guidance(Vignette)


def test_corners_get_darker():
    pipe, weights = sd_pipeline(), corners(32, 32, 0.6)
    condition = Condition("a red circle")
    plain = Sampling(pipe, condition, steps=4).finish().images
    guided = Sampling(pipe, condition, [Vignette()], steps=4).finish().images
    assert ((guided - plain) * weights).sum() < 0


def test_a_radius_outside_of_the_image_raises():
    with pytest.raises(GuidekitError, match="radius"):
        Vignette(radius=1.0)
