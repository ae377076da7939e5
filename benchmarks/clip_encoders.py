"""What encoders still see at ten levels of noise: rows of clip_guidance.py."""

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import guidekit
from clip_measures import columns
from guidekit.noise import Level
from guidekit.noisy_clip.files import load_clip
from guidekit.noisy_clip.model import CleanClip, NoisyClip
from guidekit.noisy_clip.train import logsnr_at, noised
from guidekit.worlds import scenes

LEVELS = 10
CAPTIONS = list(itertools.product(scenes.CLASSES, scenes.BACKGROUNDS))  # of one object: 192


class Quiz:
    """Held-out scenes of one object: which of all captions is the nearest to what is seen?"""

    def __init__(self, count: int, size: int, seed: int):
        plans = [scenes.scene(50_000 + i, "test", objects=(1,)) for i in range(count)]
        self.pixels = scenes.batch(plans, size)[0]
        self.truth = [(*p.things[0].phrase.split(), p.background) for p in plans]
        self.generator = torch.Generator().manual_seed(seed)

    def words(self, clip: CleanClip) -> Tensor:
        """Embeddings of the captions."""
        return clip.texts([scenes.caption([kind], ground) for kind, ground in CAPTIONS])

    def noise(self, like: Tensor) -> Tensor:
        """The same noise for every encoder."""
        return torch.randn(like.shape, generator=self.generator)

    def right(self, embedding: Tensor, words: Tensor) -> np.ndarray:
        """Whether colour, shape and background of each image's caption are right: (n, 3) bool."""
        nearest = (F.normalize(embedding, dim=-1) @ words.T).argmax(1).tolist()
        said = [(*CAPTIONS[i][0].split(), CAPTIONS[i][1]) for i in nearest]
        return np.array(
            [
                [a == b for a, b in zip(s, t, strict=True)]
                for s, t in zip(said, self.truth, strict=True)
            ]
        )


def level_row(level: int, logsnr: float, **right: np.ndarray) -> dict:
    """Accuracy of two encoders, the gain of the first, and its attributes by themselves."""
    first, second = right.values()
    row = {"method": f"level {level}", "n": len(first), "logsnr": logsnr}
    row |= columns(**{name: found.mean(1) for name, found in right.items()})
    row |= columns(gain=first.mean(1) - second.mean(1))
    return row | dict(zip(("colour", "shape", "background"), first.mean(0).tolist(), strict=True))


def encoder_rows(setting) -> list[dict]:
    """The noise-aware encoder and the frozen one on noisy images."""
    quiz = Quiz(max(setting.n, 100), 32, setting.seed)
    frozen = CleanClip(load_clip(setting.clean))
    noisy = NoisyClip.from_pretrained(setting.encoder)
    words, eps, rows = quiz.words(frozen), quiz.noise(quiz.pixels), []
    for k in range(LEVELS):
        logsnr = logsnr_at(torch.full((len(eps),), (k + 0.5) / LEVELS))
        with torch.no_grad():
            z = noised(quiz.pixels, eps, logsnr)
            found = {"noise_aware": noisy(z, logsnr).embedding, "frozen": frozen.sees(z).embedding}
        right = {name: quiz.right(embedding, words) for name, embedding in found.items()}
        rows.append(level_row(k, float(logsnr[0]), **right))
    return rows


def latent_rows(setting) -> list[dict]:
    """An encoder of latents with a stem, and the clean one on the decoded clean estimate."""
    denoiser = guidekit.Denoiser(guidekit.load("scenes"))
    quiz = Quiz(max(setting.n, 100), 64, setting.seed)
    clean = CleanClip(load_clip(setting.clean))
    noisy, rows = NoisyClip.from_pretrained(setting.latents), []
    with torch.no_grad():
        x0 = torch.cat([denoiser.latents(part) for part in quiz.pixels.split(32)])
    words, eps = quiz.words(clean), quiz.noise(x0)
    for k in range(LEVELS):
        logsnr = logsnr_at(torch.full((len(eps),), (k + 0.5) / LEVELS))
        with torch.no_grad():
            z = noised(x0, eps, logsnr)
            guess = decoded(denoiser, z, float(logsnr[0]))
            found = {"stem": noisy(z, logsnr).embedding, "decoded": clean.sees(guess).embedding}
        right = {name: quiz.right(embedding, words) for name, embedding in found.items()}
        rows.append(level_row(k, float(logsnr[0]), **right))
    return rows


def decoded(denoiser, z: Tensor, logsnr: float) -> Tensor:
    """The decoded clean estimate of an empty prompt, at the model's timestep nearest to a level."""
    scheduler = denoiser.pipeline.scheduler
    abar = scheduler.alphas_cumprod
    timestep = (abar.logit() - logsnr).abs().argmin()
    a, s = float(abar[timestep].sqrt()), float((1 - abar[timestep]).sqrt())
    level = Level(a, s, "vp", scheduler.config.prediction_type)
    parts = []
    for part in z.split(32):
        text = denoiser.text([""] * len(part), (64, 64), null=True)
        parts.append(denoiser.pixels(level.x0(denoiser(part, timestep, text), part)))
    return torch.cat(parts)
