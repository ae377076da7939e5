"""The attention kernels inside unmodified models, in Triton's interpreter (own process)."""

import pytest
import torch

import tiny
from guidekit.attention import call as attention
from guidekit.taps import tap_attention


@pytest.mark.parametrize("name", ["sd15", "pixart"])
def test_a_model_gives_what_eager_attention_gives(name):
    """Output, maps of every attention module, and their gradient to the image.

    Cross-attention runs on the kernels, self-attention on SDPA: its keys need gradients.
    """
    results = {kind: _run(name, kind) for kind in ("eager", "triton")}
    ran = results["triton"].pop("ran")
    assert ran.count("triton") == ran.count("sdpa") == len(results["eager"].pop("ran")) // 2 >= 2
    torch.testing.assert_close(results["triton"], results["eager"], rtol=2e-5, atol=2e-6)


def _run(name: str, implementation: str) -> dict:
    model, inputs, image = tiny.MODELS[name]()
    model.requires_grad_(False)
    inputs[image] = inputs[image][
        ..., :8, :8
    ].contiguous()  # its time grows with the pixels squared
    inputs[image].requires_grad_()
    maps, ran = [], []

    def read(call: attention.AttentionCall):
        weights = torch.zeros(1, call.key.shape[2], 2)
        weights[:, 1, 0] = 1
        weights[:, 2:5, 1] = 1 / 3
        out, read = attention.attend(call, weights, rows=slice(2, None))
        maps.append(read)
        ran.append(call.implementation)
        return out

    with tap_attention(model, read, implementation=implementation):
        out = model(**inputs, return_dict=False)[0]
        loss = out.square().mean() + sum(m.square().mean() for m in maps)
        (grad,) = torch.autograd.grad(loss, inputs[image])
    return dict(out=out, maps=maps, grad=grad / grad.abs().max(), ran=ran)
