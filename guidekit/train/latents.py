"""Latents of a world's training scenes, encoded once and kept between two starts of a training."""

import hashlib
import os
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from guidekit.train.vae import encode
from guidekit.train.worlds import World


def latents_of(
    world: World, vae: AutoencoderKL, count: int, size: int, cache: Path | None = None
) -> Tensor:
    """Posterior means of training scenes 0 to count, scaled to unit variance: `(count, C, h, w)`.

    cache: a file that is read where it is of this autoencoder and of as many scenes, else written.
    """
    facts = {"autoencoder": _digest(vae), "count": str(count), "size": str(size)}
    kept = _read(cache, facts) if cache else None
    if kept is None:
        with torch.autocast(vae.device.type, torch.bfloat16):
            kept = encode([world.scene(i) for i in range(count)], vae, size, world)
        if cache:
            _write(cache, kept, facts)
    return kept.float() * vae.config.scaling_factor


def _digest(vae: AutoencoderKL) -> str:
    """A number of the encoder's weights."""
    digest = hashlib.sha256()
    for value in vae.encoder.state_dict().values():
        digest.update(value.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, facts: dict[str, str]) -> Tensor | None:
    """The kept latents, if they are of these facts."""
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        return file.get_tensor("latents") if file.metadata() == facts else None


def _write(path: Path, latents: Tensor, facts: dict[str, str]) -> None:
    """Replaces the file in one move."""
    part = path.with_name(path.name + ".part")
    save_file({"latents": latents.contiguous()}, part, metadata=facts)
    os.replace(part, path)
