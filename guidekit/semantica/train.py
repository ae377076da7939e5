"""Training of a Semantica model on episodes: draw one image of a page, given another.

Loop, EMA, several processes and resume are `guidekit.train.loop`'s. The paper's optimizer is Adam
with (0.9, 0.99), eps 1e-12, a constant rate and an EMA of 0.9999 (arXiv:2405.14857).
"""

import copy
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from guidekit.errors import GuidekitError
from guidekit.images import sheet
from guidekit.semantica.encode import ImageEncoder
from guidekit.semantica.episodes import Episodes
from guidekit.semantica.model import VARIANTS, UViT, variant
from guidekit.semantica.pages import PagesOptions, data_facts, make_episodes
from guidekit.semantica.pipeline import SemanticaPipeline, denoise
from guidekit.semantica.schedule import (
    STEPS,
    SemanticaScheduler,
    epsilon_loss,
    logsnr,
    min_snr,
    noised,
)


@dataclass(kw_only=True)
class SemanticaOptions(PagesOptions):
    """The model, its condition and its sampler."""

    variant: str = "tiny"  # a | b | c | tiny | tiny-pixel
    conditioning: str = "tokens"  # tokens | film
    drop: float = 0.1  # share of the conditions replaced by none, for guidance
    noise_size: int = 32  # side at which the schedule is not shifted
    gamma: float = 0.0  # signal-to-noise ratio above which the loss weighs less; 0 is the paper's
    frac: float = 0.2  # of the sampler's variance
    reading: str = "lineage"  # of frac: lineage | literal
    checkpointing: bool = False  # less memory for a third more time
    compile: bool = False  # by torch.compile, where there is a C++ compiler, which it needs

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise GuidekitError(f"no variant {self.variant!r}; there are {', '.join(VARIANTS)}")
        if self.conditioning not in ("tokens", "film"):
            raise GuidekitError(f"conditioning must be tokens or film, not {self.conditioning!r}")
        for name in ("drop", "frac"):
            if not 0 <= getattr(self, name) <= 1:
                raise GuidekitError(f"{name} must be from 0 to 1, not {getattr(self, name):g}")
        if self.noise_size < 1 or not self.gamma >= 0:
            raise GuidekitError("noise_size must be 1 or more, gamma 0 or more")
        # Which refuses a wrong reading.
        SemanticaScheduler(noise_size=self.noise_size, frac=self.frac, reading=self.reading)


class SemanticaLoss(nn.Module):
    """Error of the noise that the predicted velocity stands for.

    encoder: makes the states of images where they are not kept; frozen, and no part of the module.
    """

    def __init__(self, unet: UViT, gamma: float = 0.0, encoder: ImageEncoder | None = None):
        super().__init__()
        self.unet, self.gamma = unet, gamma
        self.frozen = [encoder]  # in a list, so that it is no part of the module

    def forward(
        self, z: Tensor, timestep: Tensor, states: Tensor, keep: Tensor, v: Tensor, level: Tensor
    ) -> dict[str, Tensor]:
        """Mean loss of z (B, 3, H, W) at log-SNR `level` (B,) for states (B, T, D).

        Or for images (B, 3, s, s) in their place, which the encoder sees. keep (B, 1, 1): 0 where
        the condition is dropped.
        """
        states = self.states(states) * keep
        out = self.unet(z, timestep, states, return_dict=False)[0]
        return {"epsilon": (min_snr(level, self.gamma) * epsilon_loss(out, v, level)).mean()}

    def states(self, given: Tensor) -> Tensor:
        """States (B, T, D) of images, or states as they are."""
        encoder = self.frozen[0]
        if encoder is None:
            return given
        with torch.no_grad():
            return encoder.to(given.device)(given)[0].float()


class SemanticaTask:
    """Trains a UViT on the pairs of encoded pages."""

    def __init__(
        self, options: SemanticaOptions, episodes: Episodes, encoder: ImageEncoder, size: int
    ):
        self.options, self.episodes, self.encoder, self.size = options, episodes, encoder, size
        _, channels, pooled = encoder.shapes()
        self.feature = "pooled" if options.conditioning == "film" else "tokens"
        self.asked, seeing = self.feature, None
        if self.feature == "tokens" and not episodes.has_tokens:
            self.asked, seeing = "seen", encoder
        unet = variant(
            options.variant,
            sample_size=size,
            conditioning=options.conditioning,
            cross_attention_dim=pooled if self.feature == "pooled" else channels,
            noise_size=options.noise_size,
        )
        if options.checkpointing:
            unet.enable_gradient_checkpointing()
        self.net = SemanticaLoss(unet.train(), options.gamma, seeing)
        self.ready = episodes.ready
        if options.compile and _has_compiler():
            unet.compile()

    def whole_net(self) -> nn.Module:
        """A second net of the same form."""
        unet = UViT.from_config(dict(self.net.unet.config))
        return SemanticaLoss(unet, self.options.gamma, self.net.frozen[0])

    def batch(self, numbers: range, generator: torch.Generator) -> dict[str, Tensor]:
        """Noisy images at times spread evenly over the batch, and what they follow."""
        states, x0 = self.episodes.batch(numbers, self.asked)
        keep = (torch.rand(len(x0), 1, 1, generator=generator) >= self.options.drop).float()
        eps = torch.randn(x0.shape, generator=generator)
        t = torch.randperm(len(x0), generator=generator) + torch.rand(1, generator=generator)
        t = t / len(x0)
        level = logsnr(t, self.size, self.options.noise_size)
        z, v = noised(x0, eps, level)
        told = {"z": z, "timestep": t * STEPS - 1, "states": states, "keep": keep}
        return told | {"v": v, "level": level}

    def scheduler(self) -> SemanticaScheduler:
        """The sampler that fits the training's schedule."""
        options = self.options
        return SemanticaScheduler(
            image_size=self.size,
            noise_size=options.noise_size,
            frac=options.frac,
            reading=options.reading,
        )

    def preview(self) -> Image.Image:
        """Eight references above two images drawn from each at w = 0.5."""
        firsts = [self.episodes.pair(n)[0] for n in range(8)]
        (rows,) = self.episodes.store.rows(firsts, "pictures")
        unet = self.net.unet
        device = next(unet.parameters()).device
        states = self.episodes.conditions(firsts, self.asked).to(device)
        states = self.net.states(states).repeat(2, 1, 1)
        generators = [torch.Generator().manual_seed(i) for i in range(len(states))]
        training, unet.training = unet.training, False
        try:
            drawn = denoise(unet, self.scheduler(), states, 0.5, 32, generators)
        finally:
            unet.training = training
        return sheet(torch.cat([rows.float() / 127.5 - 1, drawn.cpu() * 2 - 1]), 8)

    def export(self, folder: Path) -> None:
        """Saves the pipeline, encoder included, in half precision."""
        unet, encoder = copy.deepcopy(self.net.unet).half(), self.encoder.copied().half()
        SemanticaPipeline(unet, self.scheduler(), encoder).save_pretrained(folder)


def _has_compiler() -> bool:
    """Whether there is a C++ compiler for torch.compile; a warning says so if not."""
    names = [os.environ.get("CXX", "").split(" ")[0], "g++", "clang++"]
    found = any(shutil.which(name) for name in names if name)
    if not found:
        warnings.warn(
            "no C++ compiler is here, so compile = true is passed over: the same training, slower; "
            "install g++ to have it",
            stacklevel=2,
        )
    return found


def make(options: SemanticaOptions, folder: Path, size: int, quiet: bool = True) -> SemanticaTask:
    """The task of a recipe's stage. Raises GuidekitError for a size that the model has not."""
    with torch.device("meta"):  # before images are encoded for it
        variant(options.variant, sample_size=size)
    torch_state = torch.get_rng_state()
    episodes, encoder = make_episodes(options, folder, size, quiet)
    torch.set_rng_state(torch_state)  # first weights do not depend on what was cached
    return SemanticaTask(options, episodes, encoder, size)


OPTIONS = SemanticaOptions  # of a recipe's stage
facts = data_facts  # what decides the weights beside the options
# The paper's, of which warm-up and the clipping of gradients are no part.
LOOP = {"lr": 1e-4, "ema": 0.9999, "eps": 1e-12, "weight_decay": 0.0, "decay": "constant"}
