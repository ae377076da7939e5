"""Zest as public code has it: what guidekit's steps are timed against.

Eager attention processors store every map, and one batch of null and conditional rows has a graph
through all of it.
"""

import torch
from torch import Tensor

import guidekit
from guidekit import Condition, Segment, average_maps, box_mask
from guidekit_zest import Zest

CFG = 7.5
PROMPT = "a red circle and a blue square on a white background"
CONDITION = Condition(
    PROMPT,
    segments=(
        Segment("red circle", box_mask((0.05, 0.1, 0.5, 0.6))),
        Segment("blue square", box_mask((0.5, 0.4, 0.95, 0.9))),
    ),
)


class StoringProcessor:
    """Eager attention that keeps its probabilities, with their graph (for the plain rival)."""

    def __init__(self, store: dict, site: str):
        self.store, self.site = store, site

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(text))
        value = attn.head_to_batch_dim(attn.to_v(text))
        probabilities = attn.get_attention_scores(query, key, attention_mask)
        if encoder_hidden_states is not None:
            self.store[self.site] = probabilities  # (B * heads, N, T)
        out = attn.batch_to_head_dim(torch.bmm(probabilities, value))
        return attn.to_out[1](attn.to_out[0](out))


class Plain:
    """One guided step of Zest in the style of public code, with the plugin's own loss."""

    def __init__(self, pipeline, batch: int, seeds: list[int]):
        self.pipeline, self.batch = pipeline, batch
        # The plugin only lends its masks, tokens and loss, so that both do the same mathematics.
        self.run = guidekit.sample(
            pipeline, CONDITION, [Zest(stop=1.0)], seeds=seeds, steps=50, cfg=CFG
        )
        (self.guide,) = self.run.guidances
        self.z = self.run._start()
        self.timestep = self.run.run.scheduler.timesteps[0]
        prompts = [PROMPT] * batch
        null, cond = self.run.run.text([""] * batch, null=True), self.run.run.text(prompts)
        self.text = guidekit.backbones.denoiser.Text.cat([null, cond])
        self.store: dict[str, Tensor] = {}
        # Hung in before the clock starts, as public code does once a run.
        self.before = pipeline.unet.attn_processors
        self.storing = {
            name: StoringProcessor(self.store, name.removesuffix(".processor"))
            for name in self.before
        }

    def __enter__(self) -> None:
        self.pipeline.unet.set_attn_processor(dict(self.storing))

    def __exit__(self, *_) -> None:
        self.pipeline.unet.set_attn_processor(dict(self.before))

    def __call__(self) -> Tensor:
        """The next z."""
        with torch.enable_grad():
            z = self.z.detach().requires_grad_()
            x = torch.cat([z, z])
            out = self.pipeline.unet(x, self.timestep, return_dict=False, **self.text.kwargs())[0]
            (grad,) = torch.autograd.grad(self._loss(), z)
        null, cond = out.detach().chunk(2)
        grad = grad / grad.abs().amax((1, 2, 3), keepdim=True)
        return self.z + 0.01 * (null + CFG * (cond - null)) - grad

    def _loss(self) -> Tensor:
        """Zest's loss on the conditional half of the stored maps."""
        read, maps = self.guide._read, {}
        for site, (h, w) in read.sites.items():
            p = self.store[site].unflatten(0, (2 * self.batch, -1))[self.batch :]
            maps[site] = (
                (p.float() @ read.weights[:, None]).mean(1).transpose(1, 2).unflatten(2, (h, w))
            )
        average = average_maps(maps, self.guide._common)
        return self.guide._loss(average, self.guide._masks[self.guide._common]).sum()
