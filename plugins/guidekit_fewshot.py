"""Few-shot guidance: a class or a mask, by a head on the denoiser's own features.

Graikos, Yellapragada, Samaras: Conditional generation from unconditional diffusion models using
denoiser representations, BMVC 2023, arXiv:2306.01900. The head is fitted on a handful of labelled
images by `guidekit fit`; the backbone stays as it is.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from guidekit import Branch, Condition, FeatureRead, Guidance, GuidekitError, Run, Step, hookimpl
from guidekit.heads.data import class_map, read_mask, soft_masks
from guidekit.heads.features import noised, told
from guidekit.heads.head import RANDOM, Head, load_head, random_head


@dataclass(kw_only=True)
class Fewshot(Guidance):
    """Pulls images towards a class, labels or a mask, as a fitted head sees them.

    An image's own target is `Condition(targets={"fewshot": ...})`: a label as of `label`, a class's
    number, or a mask `(H, W)` of class numbers in which -1 is free.

    form: "paper" calls the denoiser a second time on the clean estimate, at the head's fixed
    timestep, and takes the gradient through both calls. "stopped" is the same but ends the second
    call at its last site. "detached" takes no gradient through the first call. "first" reads the
    features of the first call, for heads that were fitted with --noised.
    """

    scale: float = 25.0  # the paper's lambda, for a cross-entropy that is a mean over pixels
    head: Path | None = None  # folder that guidekit fit wrote; there is none to begin with
    label: tuple[str, ...] = ()  # class to draw; of a head of labels a,-b: with a, without b
    mask: Path | None = None  # indexed PNG with the values that the head was fitted on; or none
    # Where the gradient goes: both calls, up to the last site, the second one, the first one.
    form: Literal["paper", "stopped", "detached", "first"] = "stopped"
    threshold: float = 0.2  # least probability of the class in a finished image, to be accepted

    usage: ClassVar[str] = (
        "--model digits-ddpm --set fewshot.head=heads/digits --set fewshot.label=7"
        "  # after guidekit fit shots/ --model digits-ddpm --out heads/digits"
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.threshold <= 1:
            raise GuidekitError(f"fewshot.threshold lies between 0 and 1, not {self.threshold}")

    @property
    def graph(self) -> str:
        """What the energy reads: the first call's features, z by itself, or the clean estimate."""
        return {"first": "features", "detached": "input"}.get(self.form, "x0")

    def prepare(self, run: Run) -> None:
        """Loads the head, checks it against the backbone and asks for its features."""
        self._denoiser = run.denoiser
        self._head: Head = self._load(run)
        self._head.to(run.device, torch.promote_types(run.denoiser.dtype, torch.float32))
        reading = self._head.config.reading
        if self.form == "first" and not reading.noised:
            raise GuidekitError(
                "fewshot.form=first reads features of noisy images, and the head was fitted on "
                "clean ones: guidekit fit ... --noised"
            )
        content, null = told(run.denoiser, reading.prompt)
        self._branch = Branch("head", [content] * len(run.seeds), null=null)
        self._read = run.read(self, FeatureRead(reading.sites), main=self.form == "first")
        self._target = self._wanted(run).to(run.device)

    def _load(self, run: Run) -> Head:
        if self.head is None:
            raise GuidekitError(
                "fewshot needs a head: --set fewshot.head=FOLDER, from guidekit fit"
            )
        if self.head.name == RANDOM and not self.head.exists():
            return random_head(run.denoiser)
        return load_head(self.head, run.denoiser)

    def _wanted(self, run: Run) -> Tensor:
        """The target of every image: (B, classes), or (B, classes, h, w) of masks."""
        config, own = self._head.config, run.targets(self.name)
        if config.kind == "masks":
            masks = [self._from_file(run.size)] * len(run.seeds) if own is None else own
            return soft_masks(torch.stack(list(masks)), len(config.classes), config.grid)
        labels = [self.label] * len(run.seeds) if own is None else own
        if any(label in ("", ()) for label in labels):
            raise GuidekitError(
                f"fewshot needs a label: --set fewshot.label=NAME, of {', '.join(config.classes)}"
            )
        row = self._labels if config.kind == "labels" else self._class
        return torch.stack([row(label) for label in labels])

    def _class(self, label: tuple[str, ...] | str | int) -> Tensor:
        """One at the class of that name or number (classes,)."""
        names = self._head.classes
        label = ",".join(label) if isinstance(label, tuple) else label
        if not isinstance(label, str):
            if not 0 <= int(label) < len(names):
                raise GuidekitError(f"the head has {len(names)} classes, none of number {label}")
            label = names[int(label)]
        row = torch.zeros(len(names))
        row[self._head.index(label)] = 1
        return row

    def _labels(self, label: tuple[str, ...] | str) -> Tensor:
        """Zeros and ones (labels,), NaN for labels that nobody asked for."""
        row = torch.full((len(self._head.classes),), torch.nan)
        for name in label.split(",") if isinstance(label, str) else label:
            absent = name.startswith("-") and name not in self._head.classes
            row[self._head.index(name[1:] if absent else name)] = 0.0 if absent else 1.0
        return row

    def _from_file(self, size: tuple[int, int]) -> Tensor:
        if self.mask is None:
            raise GuidekitError("fewshot needs a mask: --set fewshot.mask=FILE.png, indexed")
        values = self._head.config.values
        found = class_map(read_mask(self.mask), values, size)
        if (found < 0).all():
            exist = ", ".join(f"{v} ({c})" for v, c in zip(values, self._head.classes, strict=True))
            raise GuidekitError(f"no pixel of {self.mask} has a value of the head: {exist}")
        return found

    def energy(self, step: Step) -> Tensor:
        """Cross-entropy of the head's prediction and the target (B,)."""
        return self._head.loss(self._logits(step), self._target)

    def _logits(self, step: Step) -> Tensor:
        if self.form == "first":
            maps = self._wide(step.cond.features(self._read))
            return self._head.at_timestep(maps, float(step.timestep))
        x0, reading = self._clean(step), self._head.config.reading
        rows = []
        for timestep in reading.timesteps:
            x = x0
            if reading.noised:
                x = noised(step.run.denoiser, x0, timestep, step.noise(f"{self.name}.{timestep}"))
            found = step.denoise(
                x.to(step.run.denoiser.dtype),
                torch.as_tensor(timestep, device=x.device),
                self,
                branch=self._branch,
                stop=self.form != "paper",
            )
            rows.append(self._wide(found.features(self._read)))
        return self._head(rows)

    def _wide(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        """Features in float32 or better."""
        return {s: m.to(torch.promote_types(m.dtype, torch.float32)) for s, m in maps.items()}

    def _clean(self, step: Step) -> Tensor:
        """The clean estimate (B, C, h, w) with the graph of its form.

        Without the first call's own gradient dx0/dz = a / (a^2 + s^2): exact for pixels of unit
        variance, and small where z is noise, while that of a fixed eps would be 1 / a.
        """
        if self.form != "detached":
            return step.x0
        a, s = step.level.a, step.level.s
        return step.x0.detach() + a / (a**2 + s**2) * (step.z - step.z.detach())

    def accept(self, images: Tensor) -> Tensor:
        """Images whose target the head gives at least `threshold`; R12: bounded by --tries."""
        logits = self._head.predict(self._denoiser, images * 2 - 1)
        return (self._head.confidence(logits, self._target[: len(images)]) >= self.threshold).cpu()

    @classmethod
    def example(cls) -> "Fewshot":
        """A head that nobody fitted, on any backbone."""
        return cls(head=Path(RANDOM), label=("a",))

    @classmethod
    def example_condition(cls) -> Condition:
        """Nothing: the condition is the plugin's own."""
        return Condition()


@hookimpl
def register_guidance(register):
    """Offers `fewshot`."""
    register("fewshot", Fewshot)
