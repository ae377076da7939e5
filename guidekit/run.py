"""What stays the same over all steps of a run; guidances say in `prepare` what they need."""

from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from guidekit.account import Account
from guidekit.attention.choice import choose
from guidekit.backbones.denoiser import Denoiser, Text
from guidekit.backbones.records import layout_sites, site_grid
from guidekit.backbones.sites import named_sites
from guidekit.backbones.tokenizing import TOKENIZING
from guidekit.backbones.tokens import looked_up
from guidekit.branches import Branch
from guidekit.conditions import Condition, stretched
from guidekit.errors import GuidekitError
from guidekit.groups import rows_by_group
from guidekit.levels import Levels
from guidekit.reads import AttentionRead, FeatureRead, Reads
from guidekit.seeds import derived_seed

MEMORY = ("fast", "low")
POLICIES = ("raise", "zero")
CALLS = ("batched", "split")

Wish = TypeVar("Wish", AttentionRead, FeatureRead)


class Run:
    """Denoiser, conditions, seeds and settings of a run, its account and its reads and taps."""

    def __init__(
        self,
        denoiser: Denoiser,
        conditions: list[Condition],
        seeds: list[int],
        latent_shape: tuple[int, int, int],
        scheduler: Any,  # diffusers' base class declares none of their attributes
        *,
        cfg: float,
        memory: str = "fast",
        nonfinite: str = "raise",
        attention: str | None = None,
        step_kwargs: dict[str, Any] | None = None,
        levels: Levels | None = None,
        calls: dict[str, str] | None = None,
    ):
        _one_of("memory", memory, MEMORY)
        _one_of("nonfinite", nonfinite, POLICIES)
        for mode in (calls or {}).values():
            _one_of("calls", mode, CALLS)
        self.denoiser, self.conditions, self.seeds = denoiser, conditions, seeds
        self.latent_shape, self.scheduler, self.cfg = latent_shape, scheduler, cfg
        self.memory, self.nonfinite = memory, nonfinite
        self.attention = choose(attention)
        self.step_kwargs = step_kwargs or {}
        self.levels = Levels(scheduler, step_kwargs) if levels is None else levels
        #: Where the denoiser runs; asked once, since diffusers looks through all modules for it.
        self.device: torch.device = denoiser.device
        self.account = Account(calls={} if calls is None else dict(calls))
        for text in stretched(conditions, self.size):
            self.account.note(text)
        #: Rows of the images of every group; an image alone is one.
        self.groups = rows_by_group(conditions)
        own = denoiser.controls
        #: The denoiser's controls with what they see here; None without any.
        self.controls = None if own is None else own.prepared(conditions, self.size)
        self.reads = Reads()
        #: The run's own copies of the user's guidances; the engine puts them here.
        self.guidances: list[Any] = []
        #: Finished latents of a first z, with gradient; see `guidekit.engine.rollout.Rollout`.
        self.rollout: Any = None
        #: The z that the run would begin with by itself (B, C, h, w), known from `begin` on.
        self.first: Tensor | None = None
        self._texts: dict[tuple[tuple[str | int, ...], bool], Text] = {}
        self._lengths: dict[tuple[str | int, ...], list[int]] = {}

    @property
    def first_std(self) -> float:
        """What noise of variance 1 is multiplied by in `first`."""
        return float(getattr(self.scheduler, "init_noise_sigma", 1.0))

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return self.latent_shape[1:]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        height, width = self.grid
        return height * self.denoiser.factor, width * self.denoiser.factor

    def read(self, guidance: object, read: Wish, main: bool = True) -> Wish:
        """Asks for maps or features while `guidance` is active, and returns the read to use.

        Wildcards among the blocks of a FeatureRead are resolved in it. With main=False it is read
        only in the guidance's own calls of `step.denoise`. Raises GuidekitError for a site that the
        model does not have.
        """
        kind = "block" if isinstance(read, FeatureRead) else "attention"
        names = named_sites(self.denoiser.model, list(read.sites), kind)
        if isinstance(read, FeatureRead):
            read = replace(read, sites=tuple(names))
        self.reads.add(guidance, read, main)
        return read

    def attention_read(
        self, guidance: object, weights: Tensor, sites: dict[str, tuple[int, int]], **options: Any
    ) -> AttentionRead:
        """Asks for attention maps: `read` with the weights moved to the denoiser's device."""
        read = AttentionRead(weights.to(self.device), sites, **options)
        return self.read(guidance, read)

    def tap_attention(self, guidance: object, sites: str | list[str]) -> list[str]:
        """Asks that the attention calls at the sites be shown to `guidance.edit_attention`."""
        names = named_sites(self.denoiser.model, sites)
        self.reads.tap(guidance, "attention", names)
        return names

    def tap_blocks(self, guidance: object, sites: str | list[str]) -> list[str]:
        """Asks that the block calls at the sites be shown to `guidance.edit_block`."""
        names = named_sites(self.denoiser.model, sites, kind="block")
        self.reads.tap(guidance, "block", names)
        return names

    def targets(self, name: str) -> list[Any] | None:
        """What the conditions ask of the guidance of that name, one each; None if none does.

        Raises GuidekitError where some do and others do not.
        """
        found = [c.targets.get(name) for c in self.conditions]
        given = sum(target is not None for target in found)
        if given not in (0, len(found)):
            raise GuidekitError(
                f"{given} of {len(found)} conditions have a target for {name}; give it to all of "
                "them or to none"
            )
        return found if given else None

    def sites(self, patterns: str | list[str] | None = None) -> dict[str, tuple[int, int]]:
        """Attention sites with their grids (h, w): the family's layout sites, or those matching.

        patterns: wildcards, or names that mean the same on every family (`backbones.sites`).
        """
        model = self.denoiser.model
        if not patterns:
            return layout_sites(model, *self.grid)
        return {s: site_grid(model, s, *self.grid) for s in named_sites(model, patterns)}

    def blocks(self, patterns: str | list[str] = "blocks") -> dict[str, tuple[int, int]]:
        """Blocks with their grids (h, w): the transformer's, or those matching; see `sites`."""
        model = self.denoiser.model
        names = named_sites(model, patterns, "block")
        return {s: site_grid(model, s, *self.grid) for s in names}

    @cached_property
    def text_lengths(self) -> list[int]:
        """Number of text tokens that the pixels of each image attend to."""
        return self.denoiser.text_lengths([c.content for c in self.conditions])

    @property
    def text_length(self) -> int:
        """Number of text tokens in a call of the denoiser, with the padding of shorter ones."""
        return max(self.text_lengths)

    def token_counts(self, branch: Branch) -> list[int]:
        """Number of text tokens of each image in a call for a branch."""
        if branch.text is None:
            return self.lengths(branch.prompts)
        return [branch.text.states.shape[1]] * len(branch.prompts)

    def lengths(self, prompts: list[str | int]) -> list[int]:
        """`text_lengths` for the prompts of a branch; the same ones are counted once."""
        key = tuple(prompts)
        if key not in self._lengths:
            self._lengths[key] = self.denoiser.text_lengths(prompts)
        return self._lengths[key]

    def text(self, prompts: list[str | int], null: bool = False) -> Text:
        """The encoded prompts or classes, one per image; the same ones are encoded once."""
        key = (tuple(prompts), null)
        if key not in self._texts:
            words = [] if null else [p for p in looked_up(self.conditions) if p in prompts]
            with TOKENIZING, self.denoiser.asserted(words):
                self._texts[key] = self.denoiser.text(prompts, self.size, null)
        return self._texts[key]

    def told(self, branch: Branch, index: int, n: int) -> Text:
        """What call `index` of `n` tells the model for a branch: text, and hints of controls."""
        text = (branch.text or self.text(branch.prompts, branch.null)).windowed(branch.view)
        hints = {} if self.controls is None else self.controls.hints(branch, index, n)
        return Text(text.given | hints) if hints else text

    def noise(self, shape: tuple[int, ...], *tags: int | str) -> Tensor:
        """Normal noise of `shape` for every image, which depends on its seed and the tags only."""
        rows = [
            torch.randn(shape, generator=torch.Generator().manual_seed(derived_seed(seed, *tags)))
            for seed in self.seeds
        ]
        return torch.stack(rows).to(self.device)


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise GuidekitError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
