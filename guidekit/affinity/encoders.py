"""What estimates read: encoders of names, and features of images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guidekit.affinity.sentences import MODULES, sentence_texts
from guidekit.backbones.denoiser import Denoiser, frozen
from guidekit.backbones.loading import LOAD_ERRORS, quiet
from guidekit.errors import GuidekitError
from guidekit.heads.features import Reading, fixed_noise, observe, resolve_sites
from guidekit.images import to_image
from guidekit.noisy_clip.files import is_clip, load_clip

TIMM = "timm/"
TIMESTEP = 100  # of the denoiser's features

Texts = Callable[[list[str]], Tensor]
Features = Callable[[Tensor], Tensor]


def load_texts(name: str, load: Callable[[str], Any]) -> Texts:
    """An encoder of texts to (N, D): by sentence-transformers, open_clip, or a pipeline's CLIP.

    name: a folder, a built-in CLIP, ARCHITECTURE/TAG of open_clip, or a model that `load` knows.
    Raises GuidekitError for a pipeline without a CLIP text encoder, and as its loaders.
    """
    folder = Path(name)
    if (folder / MODULES).is_file():
        return sentence_texts(folder)
    if is_clip(name):
        return clip_texts(load_clip(name))
    return pipeline_texts(load(name))


def clip_texts(clip: Any) -> Texts:
    """The text tower of an open_clip model."""

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        return clip.model.encode_text(clip.tokenizer(texts))

    return encode


def pipeline_texts(pipeline: Any) -> Texts:
    """The pooled states of a pipeline's CLIP: SDXL's second, else the first."""
    parts = [("text_encoder_2", "tokenizer_2"), ("text_encoder", "tokenizer")]
    found = [(getattr(pipeline, e, None), getattr(pipeline, t, None)) for e, t in parts]
    clips = [pair for pair in found if "CLIP" in type(pair[0]).__name__]
    if not clips:
        raise GuidekitError(
            f"{type(pipeline).__name__} has no CLIP text encoder; name another for the texts"
        )
    encoder, tokenizer = clips[0]

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        inputs = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        out = encoder(inputs["input_ids"].to(encoder.device))
        pooled = getattr(out, "text_embeds", None)
        return (out.pooler_output if pooled is None else pooled).float().cpu()

    return encode


def load_features(
    name: str, load: Callable[[str], Any], site: str = "", **options: Any
) -> Features:
    """Features of images by a name: `timm/MODEL`, else a model that `load` knows."""
    if name.startswith(TIMM):
        return timm_features(_timm(name.removeprefix(TIMM)))
    return denoiser_features(Denoiser(load(name)), site, **options)


def denoiser_features(
    denoiser: Denoiser, site: str = "", timestep: int = TIMESTEP, noised: bool = False
) -> Features:
    """A denoiser's features at one site, of an image as it is or noised to the timestep.

    site: by default the middle one of the decoder's blocks. Choose it on source labels alone.
    """
    sites = resolve_sites(denoiser, [site] if site else [], "masks")
    reading = Reading((sites[0] if site else sites[len(sites) // 2],), (timestep,), noised)

    def see(pixels: Tensor) -> Tensor:
        with torch.no_grad(), frozen(*denoiser.models):
            x0 = denoiser.latents(pixels[None].to(denoiser.device))
            (maps,) = observe(denoiser, x0, reading, fixed_noise([0], tuple(x0.shape[1:])))
        return maps[reading.sites[0]][0].cpu()

    return see


def _timm(name: str) -> torch.nn.Module:
    import timm

    try:
        with quiet():
            return timm.create_model(name, pretrained=True, features_only=True, out_indices=(-2,))
    except LOAD_ERRORS as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise GuidekitError(f"timm has no features of {name!r} for us: {first}") from None


def timm_features(model: torch.nn.Module) -> Features:
    """The features of a timm model made with `features_only=True`, its last map.

    It sees the whole image, as label maps are of the whole: squashed, not cropped.
    """
    import timm.data

    config = timm.data.resolve_data_config({}, model=model)
    transform = timm.data.create_transform(**config | {"crop_pct": 1.0, "crop_mode": "squash"})
    model = model.eval().requires_grad_(False)

    def see(pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return model(transform(to_image(pixels / 2 + 0.5))[None])[-1][0]

    return see
