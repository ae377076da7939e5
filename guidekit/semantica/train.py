"""Training of a Semantica model on episodes: draw one picture of a page, given another.

Loop, EMA, several processes and resume are `guidekit.train.loop`'s. The paper's optimizer is Adam
with (0.9, 0.99), eps 1e-12, a constant rate and an EMA of 0.9999 (arXiv:2405.14857).
"""

import copy
import hashlib
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from guidekit.errors import GuidekitError
from guidekit.images import sheet
from guidekit.semantica.data import Pages, write_pages
from guidekit.semantica.encode import ImageEncoder, load_encoder
from guidekit.semantica.model import VARIANTS, UViT, variant
from guidekit.semantica.pairs import (
    HIGH,
    LOW,
    Episodes,
    answered,
    check_bounds,
    find_pairs,
    request,
)
from guidekit.semantica.pipeline import SemanticaPipeline, denoise
from guidekit.semantica.schedule import (
    STEPS,
    SemanticaScheduler,
    epsilon_loss,
    logsnr,
    min_snr,
    noised,
)
from guidekit.semantica.sources import (
    Item,
    files_below,
    folder_items,
    labelled_scene_items,
    scene_items,
    shard_items,
)
from guidekit.train.processes import processes

QUANTILES = (0.02, 0.98)  # of the pairs' cosines, for encoders other than DINOv2
SOURCES = ("scenes", "labelled-scenes", "folder", "shards")


@dataclass(kw_only=True)
class PagesOptions:
    """Where episodes come from and which pairs are kept."""

    source: str = "scenes"  # scenes | labelled-scenes | folder | shards
    data: str = ""  # of folder: the root; of shards: a folder of .tar files
    page: str = "page_url"  # of shards: the column that says the page, or a label
    pages: int = 4000  # of scenes
    per_page: int = 4  # pictures of a page, of scenes
    polluted: float = 0.0  # share of a page's pictures that are of no page, of scenes
    without: tuple[str, ...] = ()  # objects that no page holds, of scenes
    encoder: str = "scenes-clip"  # see semantica.encode.load_encoder; or an earlier stage's folder
    low: float | None = None  # cosine between global features below which a pair is left out
    high: float | None = None  # and above which it is; -2 and 2 keep all
    # Two shares of all pairs that give low and high instead. Without any of the three DINOv2 has
    # low = 0.3, high = 0.9, the paper's; other encoders have quantiles = [0.02, 0.98].
    quantiles: tuple[float, ...] = ()
    store: str = ""  # folder of the encoded pages, by default beside the run


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
    """Error of the noise that the predicted velocity stands for."""

    def __init__(self, unet: UViT, gamma: float = 0.0):
        super().__init__()
        self.unet, self.gamma = unet, gamma

    def forward(
        self, z: Tensor, timestep: Tensor, states: Tensor, v: Tensor, level: Tensor
    ) -> dict[str, Tensor]:
        """Mean loss of z (B, 3, H, W) at log-SNR `level` (B,) for states (B, T, D)."""
        out = self.unet(z, timestep, states, return_dict=False)[0]
        return {"epsilon": (min_snr(level, self.gamma) * epsilon_loss(out, v, level)).mean()}


class SemanticaTask:
    """Trains a UViT on the pairs of encoded pages."""

    def __init__(
        self, options: SemanticaOptions, episodes: Episodes, encoder: ImageEncoder, size: int
    ):
        self.options, self.episodes, self.encoder, self.size = options, episodes, encoder, size
        _, channels, pooled = encoder.shapes()
        self.feature = "pooled" if options.conditioning == "film" else "tokens"
        unet = variant(
            options.variant,
            sample_size=size,
            conditioning=options.conditioning,
            cross_attention_dim=pooled if self.feature == "pooled" else channels,
            noise_size=options.noise_size,
        )
        if options.checkpointing:
            unet.enable_gradient_checkpointing()
        self.net = SemanticaLoss(unet.train(), options.gamma)
        if options.compile and _has_compiler():
            unet.compile()

    def whole_net(self) -> nn.Module:
        """A second net of the same form."""
        return SemanticaLoss(UViT.from_config(dict(self.net.unet.config)), self.options.gamma)

    def batch(self, numbers: range, generator: torch.Generator) -> dict[str, Tensor]:
        """Noisy pictures at times spread evenly over the batch, and what they follow."""
        states, x0 = self.episodes.batch(numbers, self.feature)
        states = states * (torch.rand(len(x0), 1, 1, generator=generator) >= self.options.drop)
        eps = torch.randn(x0.shape, generator=generator)
        t = torch.randperm(len(x0), generator=generator) + torch.rand(1, generator=generator)
        t = t / len(x0)
        level = logsnr(t, self.size, self.options.noise_size)
        z, v = noised(x0, eps, level)
        return {"z": z, "timestep": t * STEPS - 1, "states": states, "v": v, "level": level}

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
        """Eight references above two pictures drawn from each at w = 0.5."""
        firsts = [self.episodes.pair(n)[0] for n in range(8)]
        rows, states = self.episodes.pages.rows(firsts, "pictures", self.feature)
        states = states.float()
        states = (states[:, None] if states.ndim == 2 else states).repeat(2, 1, 1)
        unet = self.net.unet
        generators = [torch.Generator().manual_seed(i) for i in range(len(states))]
        training, unet.training = unet.training, False
        device = next(unet.parameters()).device
        try:
            drawn = denoise(unet, self.scheduler(), states.to(device), 0.5, 32, generators)
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


def items(
    options: PagesOptions, size: int, leave_out: tuple[Path, ...] = ()
) -> Iterator[Item | None]:
    """The pictures that the options name; ValueError that says what is missing.

    leave_out: folders inside a folder of pages that are none, such as the run's own.
    """
    if options.source not in SOURCES:
        raise GuidekitError(f"no source {options.source!r}; there are {', '.join(SOURCES)}")
    if options.source == "scenes":
        return scene_items(
            options.pages,
            options.per_page,
            size,
            polluted=options.polluted,
            without=tuple(options.without),
        )
    if options.source == "labelled-scenes":
        return labelled_scene_items(
            options.pages, options.per_page, size, without=tuple(options.without)
        )
    if not options.data:
        raise GuidekitError(f"source {options.source} needs data, the folder that it is in")
    if options.source == "folder":
        return folder_items(Path(options.data), leave_out)
    shards = sorted(Path(options.data).glob("*.tar"))
    if not shards:
        raise GuidekitError(f"no .tar files in {options.data}")
    return shard_items(shards, options.page)


def facts(options: PagesOptions, leave_out: tuple[Path, ...] = ()) -> dict:
    """What decides which pictures there are: options, names and sizes of the files."""
    names = ("source", "data", "page", "pages", "per_page", "polluted", "without")
    found = {n: list(v) if isinstance(v := getattr(options, n), tuple) else v for n in names}
    digest = hashlib.sha256()
    for path in files_below(Path(options.data), leave_out) if options.data else ():
        if path.is_file():
            digest.update(f"{path.relative_to(options.data)} {path.stat().st_size}\n".encode())
    return found | {"files": digest.hexdigest()[:16]}


Bounds = tuple[float | None, float | None, tuple[float, float] | None]


def bounds(options: PagesOptions, encoder: ImageEncoder) -> Bounds:
    """low, high and quantiles of the filter, by the encoder where none is given."""
    if len(options.quantiles) not in (0, 2):
        raise GuidekitError(f"quantiles are two numbers, not {len(options.quantiles)}")
    check_bounds(options.low, options.high, options.quantiles or None)
    if options.quantiles or (options.low, options.high) != (None, None):
        return options.low, options.high, options.quantiles or None
    if "dinov2" in encoder.source:
        return LOW, HIGH, None
    return None, None, QUANTILES


def make_episodes(
    options: PagesOptions, folder: Path, size: int, quiet: bool = False
) -> tuple[Episodes, ImageEncoder]:
    """Encoded and filtered pages of pictures of `size`; the first process makes them.

    On several machines `folder` and `store` lie where all of them read.
    """
    own = folder / options.encoder
    name = own if (own / "config.json").exists() else options.encoder
    encoder, state = load_encoder(name), processes()
    kept = bounds(options, encoder)
    store = Path(options.store) if options.store else folder / "pages"
    chosen, away = folder / "filter", (folder, store)
    with state.main_process_first():
        if state.is_main_process:
            encoder.to(state.device)
            pages = write_pages(
                items(options, size, away),
                encoder,
                store,
                size,
                quiet=quiet,
                facts=facts(options, away),
            )
            if not answered(chosen, request(pages, *kept)):
                found = find_pairs(pages, *kept, chosen)
                if not quiet:
                    print(
                        f"pages    {len(pages)} pictures, {pages.unreadable} unreadable; "
                        f"{found.share:.0%} of {found.total} pairs kept, {chosen}/histogram.png"
                    )
            encoder.to("cpu")
    return Episodes(Pages(store), chosen), encoder


def make(options: SemanticaOptions, folder: Path, size: int, quiet: bool = True) -> SemanticaTask:
    """The task of a recipe's stage. Raises GuidekitError for a size that the model has not."""
    with torch.device("meta"):  # before pictures are encoded for it
        variant(options.variant, sample_size=size)
    torch_state = torch.get_rng_state()
    episodes, encoder = make_episodes(options, folder, size, quiet)
    torch.set_rng_state(torch_state)  # first weights do not depend on what was cached
    return SemanticaTask(options, episodes, encoder, size)


OPTIONS = SemanticaOptions  # of a recipe's stage
# The paper's, of which warm-up and the clipping of gradients are no part.
LOOP = {"lr": 1e-4, "ema": 0.9999, "eps": 1e-12, "weight_decay": 0.0, "decay": "constant"}
