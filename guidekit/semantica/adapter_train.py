"""Training of an image adapter on episodes: the backbone and its text encoder stay frozen."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import PartialState
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from guidekit.backbones.loading import load
from guidekit.errors import GuidekitError
from guidekit.images import sheet
from guidekit.references import to_pixels
from guidekit.semantica.adapter import ImageAdapter, new_adapter
from guidekit.semantica.encode import ImageEncoder
from guidekit.semantica.episodes import Episodes
from guidekit.semantica.pages import PagesOptions, data_facts, make_episodes
from guidekit.train.beside import Backbone, BesideLoss, with_words


@dataclass(kw_only=True)
class AdapterOptions(PagesOptions):
    """The backbone, and how often it learns without words or without image."""

    backbone: str = "scenes"  # a Stable Diffusion pipeline, as for guidekit sample --model
    drop: float = 0.1  # share of the images replaced by none
    wordless: float = 0.5  # share of the captions replaced by the empty prompt


class AdapterLoss(BesideLoss):
    """The backbone's own loss, the adapter being what is trained."""

    def __init__(self, adapter: ImageAdapter, unet: nn.Module):
        super().__init__(unet)
        self.adapter = adapter

    def forward(
        self, z: Tensor, timestep: Tensor, states: Tensor, tokens: Tensor, target: Tensor
    ) -> dict[str, Tensor]:
        """Error at latents z (B, C, h, w), text states (B, T, D), encoder tokens (B, T', D')."""
        with self.adapter.attached(self.unet, self.adapter(tokens)):
            return self.error(z, timestep, states, target)


class AdapterTask:
    """Trains the adapter of a Stable Diffusion pipeline on encoded pages."""

    encodes = True  # its batches, by the backbone's autoencoder and text encoder

    def __init__(
        self,
        options: AdapterOptions,
        episodes: Episodes,
        encoder: ImageEncoder,
        pipeline: StableDiffusionPipeline,
        size: int,
    ):
        self.options, self.episodes, self.encoder = options, episodes, encoder
        self.asked, self.ready = "tokens" if episodes.has_tokens else "seen", episodes.ready
        self.pipeline, self.size, self.backbone = pipeline, size, Backbone(pipeline)
        self.net = self.whole_net()

    def whole_net(self) -> nn.Module:
        """A net of an adapter that is bound to its encoder."""
        encoder, unet = self.encoder, self.pipeline.unet
        bound = encoder.source, encoder.fingerprint()
        return AdapterLoss(new_adapter(unet, encoder.shapes()[1], *bound), unet)

    def batch(self, numbers: range, generator: torch.Generator) -> dict[str, Tensor]:
        """Noisy latents of the images to draw, their captions, and the conditions' tokens."""
        rows = [self.episodes.pair(n)[1] for n in numbers]
        tokens, x0 = self.episodes.batch(numbers, self.asked)
        tokens = self._tokens(tokens)
        tokens = tokens * (torch.rand(len(x0), 1, 1, generator=generator) >= self.options.drop)
        texts = with_words(self.episodes.store.captions(rows), self.options.wordless, generator)
        latents, states = self.backbone.encoded(x0, texts)
        eps = torch.randn(latents.shape, generator=generator)
        timestep = torch.randint(self.backbone.timesteps, (len(x0),), generator=generator)
        noisy = self.backbone.noisy(latents, eps, timestep)
        return noisy | {"states": states, "tokens": tokens}

    def _tokens(self, given: Tensor) -> Tensor:
        """Tokens (B, T, D) on the CPU: those that are kept, or of what the encoder sees."""
        if self.asked == "tokens":
            return given
        with torch.no_grad():
            return self.encoder.to(self.pipeline.device)(given)[0].float().cpu()

    def preview(self) -> Image.Image:
        """Eight references above an image that is drawn from each without words."""
        rows = [self.episodes.pair(n)[0] for n in range(8)]
        (pictures,) = self.episodes.store.rows(rows, "pictures")
        adapter, pipeline = self.net.adapter, self.pipeline
        tokens = self._tokens(self.episodes.conditions(rows, self.asked))
        image = adapter(tokens.to(adapter.device))
        pipeline.set_progress_bar_config(disable=True)
        with adapter.attached(pipeline.unet, image):
            drawn = pipeline(
                [""] * 8,
                num_inference_steps=20,
                guidance_scale=1.0,
                output_type="pt",
                generator=[torch.Generator().manual_seed(i) for i in range(8)],
            ).images
        drawn = drawn.cpu().float() * 2 - 1
        shown = F.interpolate(to_pixels(pictures), drawn.shape[-2:])
        return sheet(torch.cat([shown, drawn]), 8)

    def export(self, folder: Path) -> None:
        """Saves the adapter, and the encoder that it reads in the folder `encoder`."""
        self.net.adapter.save_pretrained(folder)
        self.encoder.save_pretrained(Path(folder) / "encoder")


def make(options: AdapterOptions, folder: Path, size: int, quiet: bool = True) -> AdapterTask:
    """The task of a recipe's stage."""
    # Half precision is the loop's; which device is this process's, make_episodes settles.
    pipeline = load(options.backbone, "cpu", torch.float32)
    if not isinstance(pipeline, StableDiffusionPipeline):
        raise GuidekitError(
            f"backbone {options.backbone} is a {type(pipeline).__name__}; adapters are trained for "
            "Stable Diffusion 1.x and 2.x, such as the built-in scenes"
        )
    episodes, encoder = make_episodes(options, folder, size, quiet)
    task = AdapterTask(options, episodes, encoder, pipeline, size)
    pipeline.to(PartialState().device)
    return task


OPTIONS = AdapterOptions  # of a recipe's stage
facts = data_facts  # what decides the weights beside the options
