"""Logits of resized queries are resized logits, also under masks."""

import pytest
import torch
import torch.nn.functional as F

from guidekit.attention.maps import resized_logits, token_maps


@pytest.mark.parametrize("size, mode", [((8, 8), "bilinear"), ((2, 2), "area"), ((4, 4), None)])
@pytest.mark.parametrize("bias", ["none", "columns", "pixels"])
def test_they_are_the_resized_logits(size, mode, bias):
    torch.manual_seed(0)
    query, key = (torch.randn(2, 3, n, 5, dtype=torch.float64) for n in (16, 7))
    mask = {
        "none": None,
        "columns": torch.tensor([True] * 5 + [False] * 2)[None, None, None],
        "pixels": torch.randn(2, 1, 16, 7, dtype=torch.float64),
    }[bias]
    logits = query @ key.mT * 5**-0.5
    if bias == "columns":
        logits = logits.masked_fill(~mask, float("-inf"))
    if bias == "pixels":
        logits = logits + mask
    images = logits.flatten(0, 1).mT.unflatten(2, (4, 4))
    if mode:
        images = torch.nan_to_num(images, neginf=-1e30)
        images = F.interpolate(images, size, mode=mode)
    p = images.softmax(1).flatten(2).mT.unflatten(0, (2, 3))
    weights = torch.eye(7, dtype=torch.float64)[None]
    resized = resized_logits(query, mask, (4, 4), size)
    found = token_maps(resized[0], key, weights, resized[1], reduce="none")
    torch.testing.assert_close(found, p.mT)


def test_their_gradient_reaches_the_query():
    query = torch.randn(1, 2, 16, 4, dtype=torch.float64, requires_grad=True)
    key, weights = torch.randn(1, 2, 5, 4, dtype=torch.float64), torch.eye(5)[None].double()

    def maps(query):
        resized, _ = resized_logits(query, None, (4, 4), (8, 8))
        return token_maps(resized, key, weights)

    assert torch.autograd.gradcheck(maps, query)
