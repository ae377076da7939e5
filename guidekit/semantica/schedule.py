"""Noise schedule, loss and sampler of Semantica.

Cosine schedule in log-SNR, shifted for the image's size; v-prediction with the loss in epsilon:
simple diffusion, Hoogeboom, Heek, Salimans 2023, arXiv:2301.11093, section 3 and appendix B. The
reverse variance lies between its two bounds: Semantica, arXiv:2405.14857.
"""

import math
from typing import Literal

import torch

# from_pretrained of a pipeline looks for the base class in the module of each part.
from diffusers import DDPMScheduler, SchedulerMixin  # noqa: F401
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from guidekit.errors import GuidekitError

ENDS = 15.0  # log-SNR of the unshifted cosine at t = 0, and minus that at t = 1
STEPS = 1000  # rows of the scheduler's table; timestep i stands for t = (i + 1) / STEPS
NOISE_SIZE = 32  # side of the image at which the cosine is not shifted


def shift(image_size: int, noise_size: int = NOISE_SIZE) -> float:
    """What is added to the log-SNR: 2 log(noise_size / image_size), -4.159 for 256."""
    return 2 * math.log(noise_size / image_size)


def logsnr(t: Tensor, image_size: int, noise_size: int = NOISE_SIZE) -> Tensor:
    """Log-SNR at time t in [0, 1], falling from 15 to -15 before the shift.

    As in k-diffusion the ends are shifted too: every level is that of the small image.
    """
    low, high = math.atan(math.exp(-ENDS / 2)), math.atan(math.exp(ENDS / 2))
    return -2 * torch.log(torch.tan(low + t * (high - low))) + shift(image_size, noise_size)


def noised(x0: Tensor, eps: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """z = a x0 + s eps and the velocity v = a eps - s x0, at log-SNR `level` (B,)."""
    level = level.view(-1, *[1] * (x0.ndim - 1))
    a, s = torch.sigmoid(level).sqrt(), torch.sigmoid(-level).sqrt()
    return a * x0 + s * eps, a * eps - s * x0


def epsilon_loss(out: Tensor, v: Tensor, level: Tensor) -> Tensor:
    """Squared error of the noise that the predicted velocity stands for, one per image (B,).

    eps = s z + a v, so the error of eps is a = sqrt(sigmoid(level)) times that of v.
    """
    error = (out.float() - v.float()).square().flatten(1).mean(1)
    return torch.sigmoid(level.float()) * error


def min_snr(level: Tensor, gamma: float) -> Tensor:
    """Weight min(SNR, gamma) / SNR of the loss in epsilon at log-SNR `level` (B,); 1 for gamma 0.

    Hang et al. 2023, arXiv:2303.09556: nearly clean images have most of the loss and tell least.
    """
    if not gamma:
        return torch.ones_like(level)
    return (gamma * torch.exp(-level)).clamp(max=1)


Reading = Literal["lineage", "literal"]


class SemanticaScheduler(DDPMScheduler):
    """DDPM on the shifted cosine, with an ancestral variance between its two bounds.

    The logarithm of the variance lies between the posterior's (small, exact for data without
    spread) and the forward step's (large, exact for white data). reading says which of the two
    `frac` belongs to. "lineage", the default: frac to the large one, as `medium:0.2` in the code
    that simple diffusion comes from. "literal": frac to the small one, as the paper's
    sigma_{t->s}^0.2 sigma_{st}^0.8 reads with simple diffusion's letters. They agree within 2% but
    for the last steps, where the literal one leaves up to half again as much noise. Pixels of
    images have little spread given the rest, which is the case that the small variance is exact
    for. Independent Gaussian pixels of std 0.5 are the other case: in closed form 64 steps give
    0.500 by the literal reading and 0.480 by this one (benchmarks/semantica.py --part variance).
    """

    @register_to_config
    def __init__(
        self,
        *,  # diffusers takes positional ones for defaults, which from_config leaves out
        image_size: int = 256,
        noise_size: int = NOISE_SIZE,
        frac: float = 0.2,
        reading: Reading = "lineage",
        num_train_timesteps: int = STEPS,
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        prediction_type: str = "v_prediction",
        variance_type: str = "interpolated",
        timestep_spacing: str = "trailing",
        steps_offset: int = 0,
    ):
        if reading not in ("lineage", "literal"):
            raise GuidekitError(f"reading must be lineage or literal, not {reading!r}")
        if not 0 <= frac <= 1:
            raise GuidekitError(f"frac lies from 0 to 1, not {frac}")
        t = torch.arange(1, num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
        self.alphas_cumprod = torch.sigmoid(logsnr(t, image_size, noise_size)).float()
        before = torch.cat([torch.ones(1), self.alphas_cumprod[:-1]])
        self.alphas, self.betas = self.alphas_cumprod / before, 1 - self.alphas_cumprod / before
        self.one, self.init_noise_sigma = torch.tensor(1.0), 1.0
        self.custom_timesteps, self.num_inference_steps = False, None
        self.timesteps = torch.arange(num_train_timesteps).flip(0)
        self.variance_type = variance_type

    def shared_settings(self) -> dict:
        """Settings that let another diffusers scheduler follow this schedule.

        `from_config` alone would take that scheduler's own betas and let it expect epsilon.
        """
        config = self.config
        return {
            "trained_betas": self.betas.tolist(),
            "num_train_timesteps": config.num_train_timesteps,
            "prediction_type": config.prediction_type,
            "timestep_spacing": config.timestep_spacing,
            "clip_sample": config.clip_sample,
            "clip_sample_range": config.clip_sample_range,
        }

    def previous_timestep(self, timestep: int) -> int:
        """The timestep after this one on the way to the image; -1, which is no noise, at the end.

        DDPM's own takes a fixed stride, which misses the steps of a trailing spacing.
        """
        place = int((self.timesteps == timestep).nonzero()[0])
        return int(self.timesteps[place + 1]) if place + 1 < len(self.timesteps) else -1

    def _get_variance(self, t: int, predicted_variance=None, variance_type=None) -> Tensor:
        """Variance of the fresh noise of the step from t; 0 for the last one."""
        after = self.previous_timestep(t)
        if after < 0:
            return torch.tensor(0.0)
        now, then = self.alphas_cumprod[t].double(), self.alphas_cumprod[after].double()
        ratio = (now / (1 - now)) / (then / (1 - then))  # SNR(t) / SNR(s)
        small, large = (1 - ratio) * (1 - then), (1 - ratio) * (1 - now)
        own = self.config.frac if self.config.reading == "lineage" else 1 - self.config.frac
        return torch.exp(own * large.log() + (1 - own) * small.log()).float()
