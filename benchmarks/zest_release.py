"""Zest beside the released code's method on one trained model: maps and gradient.

    python benchmarks/zest_release.py --quick
    python benchmarks/zest_release.py --json benchmarks/results/zest-release.json

The release (gcouairon/zestguide, Stable Diffusion 1.4) resizes the logits of coarse sites before
the softmax; the paper resizes maps. "release" here is that, written again from the paper's Eq. 4
and the description of the resizing, with nothing of the plugin in it: logits are computed from the
inputs of the attention modules, materialised, resized, and softmaxed. The rows are the plugin with
`resize="maps"` and `resize="logits"`, each at the latents of its own runs: the largest difference
of the phrases' mean maps and the cosine of the gradients, means over the seeds with 95 % intervals.
"""

import itertools
import math
import statistics
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import guidekit
from guidekit import Condition, Segment, box_mask
from guidekit.evaluate.rows import mean_column
from guidekit_zest import Zest
from measured import Results

PROMPT = "a red circle and a blue square on a white background"
BOXES = {"red circle": (0.05, 0.1, 0.5, 0.6), "blue square": (0.5, 0.4, 0.95, 0.9)}
CONDITION = Condition(PROMPT, segments=tuple(Segment(p, box_mask(b)) for p, b in BOXES.items()))
EPS = 1e-4
AT = (0.0, 0.2, 0.4)  # fractions of the steps at which latents are compared


class Release:
    """The conditional maps and the gradient of Eq. 4, from what goes into the modules."""

    def __init__(self, pipeline, sites: dict[str, tuple[int, int]], columns: list[list[int]]):
        self.unet, self.sites, self.columns = pipeline.unet, sites, columns
        self.size = max(sites.values(), key=math.prod)

    def maps(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """Mean attention of each phrase (B, S, h, w), with gradient to x."""
        kept = {}
        handles = [
            self.unet.get_submodule(site).register_forward_pre_hook(
                _keeper(kept, site), with_kwargs=True
            )
            for site in self.sites
        ]
        self.unet(x, timestep, encoder_hidden_states=text)
        for handle in handles:
            handle.remove()
        mean = torch.stack([self._one(site, *given) for site, given in kept.items()]).mean(0)
        return torch.stack([mean[:, c].sum(1) for c in self.columns], 1)

    def _one(self, site: str, pixels: Tensor, text: Tensor) -> Tensor:
        """Attention (B, T, h, w) of a module, the mean over its heads."""
        module = self.unet.get_submodule(site)
        split = lambda x: x.unflatten(-1, (module.heads, -1)).transpose(1, 2)  # noqa: E731
        query, key = split(module.to_q(pixels)), split(module.to_k(text))
        logits = (query @ key.mT / math.sqrt(query.shape[-1])).mT  # (B, H, T, N)
        images = logits.flatten(0, 1).unflatten(2, self.sites[site])
        images = F.interpolate(images, self.size, mode="bilinear").unflatten(0, logits.shape[:2])
        return images.softmax(2).mean(1)

    def gradient(self, x: Tensor, timestep: Tensor, text: Tensor, masks: Tensor) -> Tensor:
        """Gradient of Eq. 4, summed over the phrases, with respect to x."""
        x = x.detach().requires_grad_()
        maps = self.maps(x, timestep, text)
        peak = maps.amax((2, 3), keepdim=True)
        loss = sum(
            F.binary_cross_entropy(m.clamp(EPS, 1 - EPS), masks, reduction="none").mean((2, 3))
            for m in (maps, maps / peak)
        )
        return torch.autograd.grad(loss.sum(), x)[0]


def _keeper(kept: dict, site: str):
    def hook(module, args, kwargs):
        kept[site] = (args[0], kwargs["encoder_hidden_states"])

    return hook


class Measured(Zest):
    """Keeps its gradients and mean maps."""

    def push(self, step, grad):
        maps = step.cond.attention(self._read).values()
        resized = [F.interpolate(m, self._common, mode="bilinear") for m in maps]
        step.found = (torch.stack(resized).mean(0).detach(), grad.detach())
        return super().push(step, grad)


def compare(pipeline, seed: int, steps: int, resize: str) -> list[dict]:
    """Maps and gradients of the plugin and of the release at the same latents of one run."""
    guide = Measured(resize=resize, eps=EPS, stop=1.0)
    sampling = guidekit.sample(pipeline, CONDITION, [guide], seeds=[seed], steps=steps)
    rows, compared = [], [round(at * steps) for at in AT]
    for step in itertools.islice(sampling, max(compared) + 1):
        if step.index not in compared:
            continue
        guide = sampling.guidances[0]
        read, run = guide._read, step.run
        columns = [torch.nonzero(w).flatten().tolist() for w in read.weights[0].T]
        release = Release(pipeline, read.sites, columns)
        x = run.scheduler.scale_model_input(step.z, step.timestep)
        text = run.text([PROMPT]).states
        masks = guide._masks[release.size]
        own_maps, own = step.found
        with torch.no_grad():
            maps = release.maps(x, step.timestep, text)
        with torch.enable_grad():
            grad = release.gradient(x, step.timestep, text, masks)
        rows.append(
            {
                "map": float((own_maps - maps).abs().max()),
                "cosine": float(F.cosine_similarity(own.flatten(), grad.flatten(), dim=0)),
            }
        )
    return rows


@click.command()
@click.option("--model", default="scenes", help="Built-in, directory or hub id of the SD family.")
@click.option("--seed", default=0, help="The first seed.")
@click.option("--count", default=16, help="Number of seeds.")
@click.option("--quick", is_flag=True, help="Two seeds, ten steps.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Where to store the table.")
def main(model: str, seed: int, count: int, quick: bool, path: Path | None) -> None:
    """Prints, for both ways of resizing, how far the plugin is from the release's method."""
    torch.set_num_threads(1)
    pipeline = guidekit.load(model)
    pipeline.unet.requires_grad_(False)
    count, steps = (2, 10) if quick else (count, 50)
    facts = {"seeds": [seed, seed + count - 1], "intervals": "95% intervals over seeds"}
    results = Results(path, model=model, n=count, steps=steps, **facts)
    print(f"{model}, {count} seeds from {seed}, latents at {AT} of {steps} steps")
    print(f"{'resize':8} {'map: largest difference':>26} {'gradient: cosine':>22}")
    for resize in ("maps", "logits"):
        rows = [compare(pipeline, s, steps, resize) for s in range(seed, seed + count)]
        found = {"resize": resize}
        for key in ("map", "cosine"):
            means = [statistics.mean(row[key] for row in own) for own in rows]
            found |= mean_column(key, np.array(means))
        (m, (a, b)), (c, (d, e)) = ((found[k], found[f"{k} 95%"]) for k in ("map", "cosine"))
        print(f"{resize:8} {m:10.2e} [{a:.1e}, {b:.1e}] {c:10.4f} [{d:.4f}, {e:.4f}]")
        results.extend([found])
    results.finish()


if __name__ == "__main__":
    main()
