"""Latents of a world's training scenes: encoded once, in chunks, when they are first asked for."""

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

CHUNK = 256  # scenes that are encoded together, so that a latent never depends on who asked first


class Latents:
    """Posterior means of training scenes 0 to count, scaled to unit variance."""

    def __init__(
        self, world: World, vae: AutoencoderKL, count: int, size: int, cache: Path | None = None
    ):
        """cache: a folder that keeps the chunks for a training that is started again."""
        self.world, self.vae, self.count, self.size, self.cache = world, vae, count, size, cache
        self._chunks: dict[int, Tensor] = {}
        self._facts = {"autoencoder": _digest(vae), "size": str(size)} if cache else {}

    def of(self, numbers: list[int]) -> Tensor:
        """Latents of the numbered scenes: `(B, C, h, w)` float32."""
        kept = torch.stack([self._chunk(i // CHUNK)[i % CHUNK] for i in numbers])
        return kept.float() * self.vae.config.scaling_factor

    def fill(self) -> "Latents":
        """Encodes all of them now, as worker processes need it."""
        for number in range(-(-self.count // CHUNK)):
            self._chunk(number)
        return self

    def _chunk(self, number: int) -> Tensor:
        """Latents of scenes from `number * CHUNK` on, unscaled."""
        if number not in self._chunks:
            path = self.cache / f"{number:05d}.safetensors" if self.cache else None
            kept = _read(path, self._facts) if path else None
            if kept is None:
                kept = self._encode(range(number * CHUNK, min((number + 1) * CHUNK, self.count)))
                if path:
                    _write(path, kept, self._facts)
            self._chunks[number] = kept
        return self._chunks[number]

    def _encode(self, numbers: range) -> Tensor:
        plans = [self.world.scene(i) for i in numbers]
        with torch.autocast(self.vae.device.type, torch.bfloat16):
            return encode(plans, self.vae, self.size, self.world)


def _digest(vae: AutoencoderKL) -> str:
    """A number of the encoder's weights."""
    digest = hashlib.sha256()
    for value in [*vae.encoder.parameters(), *vae.quant_conv.parameters()]:
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
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    save_file({"latents": latents.contiguous()}, part, metadata=facts)
    os.replace(part, path)
