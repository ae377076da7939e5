"""Semantica: draw another image with the semantics of a reference image.

Kumar, Fischer, Greff, Weissenborn, Houlsby: Conditional diffusion on web-scale image pairs,
2024, arXiv:2405.14857. With a Semantica model the reference is its condition and this adds the
guidance (1 + w) cond - w null. With a text-to-image backbone an adapter adds the reference's tokens
as further keys and values of cross-attention (IP-Adapter, Ye et al. 2023, arXiv:2308.06721).
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor

from guidekit import (
    AttentionCall,
    Branch,
    Condition,
    Guidance,
    GuidekitError,
    Reference,
    Run,
    Step,
    hookimpl,
    load_reference,
)
from guidekit.semantica.adapter import (
    SITES,
    check_bound,
    load_adapter,
    load_clip_tower,
    random_adapter,
    settled_encoder,
)
from guidekit.toolbox import to_image

if TYPE_CHECKING:
    from guidekit.semantica.encode import ImageEncoder

RANDOM = "random"  # the name of an adapter that nobody trained


@dataclass(kw_only=True)
class Semantica(Guidance):
    """Follows the reference image of `--image`.

    fit: what the encoder, which reads a square, sees of a reference that is none: its largest
    middle square, the whole on white, or three squares along its longer side, whose tokens are read
    side by side (a model of conditioning film reads the mean of the three).
    """

    scale: float = 1.0  # strength: of the adapter's tokens, or a factor of w
    w: float = 0.5  # of a Semantica model: guidance, (1 + w) cond - w null
    adapter: Path | None = None  # of text-to-image: folder, or IP-Adapter .safetensors; or none
    encoder: str | Path = ""  # of the adapter: what encodes the reference; "" is the adapter's own
    fit: Literal["crop", "pad", "crops"] = "crop"  # what is seen of a reference that is no square

    reads_image: ClassVar[bool] = True
    usage: ClassVar[str] = "--model scenes-semantica --image scene-3"

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.w < float("inf"):  # nan is not either
            raise GuidekitError(
                f"{self.name}.w is a finite guidance factor of at least 0, not {self.w}"
            )
        self.encoder = settled_encoder(self.encoder)

    @property
    def needs(self) -> tuple[str, ...]:
        """An adapter's tokens are read beside those of a prompt."""
        return () if self.adapter is None else ("text", "cross-attention")

    def prepare(self, run: Run) -> None:
        """Finds out which of its two forms the model has, and encodes the references."""
        if any(condition.image is None for condition in run.conditions):
            raise GuidekitError(f"{self.name} follows an image: give --image ref.png")
        self._tokens: Tensor | None = None
        if run.denoiser.reads_image:
            if run.denoiser.model.config.conditioning == "none":
                raise GuidekitError(
                    f"{self.name} follows an image and this model was trained without any; "
                    "take one of conditioning tokens or film"
                )
            if run.cfg > 1:
                raise GuidekitError(f"give cfg or {self.name}.w, not both: cfg is 1 + w")
            self._fit_references(run)
            return
        if self.adapter is None:
            raise GuidekitError(
                f"{self.name} needs an adapter for {type(run.denoiser.model).__name__}: set "
                f"{self.name}.adapter, or use a model such as scenes-semantica"
            )
        with torch.random.fork_rng(devices=[]):  # modules draw weights before they are loaded
            self._attach(run)

    def _fit_references(self, run: Run) -> None:
        """Puts references that are seen as `fit` says in place of the conditions' own."""
        if self.fit == "crop":  # or as a reference from Python says itself
            return
        seen = {c.image: dataclasses.replace(c.image, fit=self.fit) for c in run.conditions}
        run.conditions = [dataclasses.replace(c, image=seen[c.image]) for c in run.conditions]

    def _attach(self, run: Run) -> None:
        """Tokens (B, T, D) of the references and of none, and the sites that read them.

        Those of three squares are three times as many; the same thrice act like once.
        """
        from guidekit.semantica.encode import random_encoder  # timm and open_clip take seconds

        model = run.denoiser.model
        references = [condition.image for condition in run.conditions]
        if self.adapter.name == RANDOM and not self.adapter.exists():
            states = self._seen(random_encoder(), references)
            self._adapter, null = random_adapter(model, states.shape[-1]), torch.zeros_like(states)
        else:
            self._adapter = load_adapter(self.adapter, model)
            states, null = self._encoded(references, run)
        if states.shape[-1] != self._adapter.reads:
            raise GuidekitError(
                f"{self.name}.adapter {self.adapter} reads {self._adapter.reads} channels, the "
                f"image encoder gives {states.shape[-1]}; set {self.name}.encoder to the one "
                "that it was trained with"
            )
        with torch.no_grad():
            self._tokens, self._null = (
                self._adapter(rows.to(run.device, model.dtype))
                .unflatten(0, (len(references), -1))
                .flatten(1, 2)
                for rows in (states, null)
            )
        run.tap_attention(self, SITES)

    def _encoded(self, references: list[Reference], run: Run) -> tuple[Tensor, Tensor]:
        """What the adapter's encoder says of the references, and what stands for none.

        Tokens, CLIP's embedding, or CLIP's last but one layer (IP-Adapter Plus).
        """
        from guidekit.semantica.encode import load_encoder

        name = self.encoder or str(self.adapter / "encoder")
        published = self.adapter.suffix == ".safetensors"
        if published and not self.encoder and getattr(run.denoiser.pipeline, "image_encoder", None):
            return self._clip(run.denoiser.pipeline.image_encoder, references)
        if published and not self.encoder:
            raise GuidekitError(
                f"{self.name} needs the image encoder of {self.adapter.name}: set "
                f"{self.name}.encoder to the folder of its CLIPVisionModelWithProjection"
            )
        if published:
            return self._clip(load_clip_tower(Path(name), f"{self.name}.encoder"), references)
        encoder = load_encoder(name)
        if note := check_bound(self._adapter, encoder, f"{self.name}.adapter {self.adapter}"):
            run.account.note(note)
        states = self._seen(encoder, references)
        return states, torch.zeros_like(states)

    def _seen(self, encoder: "ImageEncoder", references: list[Reference]) -> Tensor:
        """What an encoder says of the references' squares, (B * V, T, D)."""
        size = encoder.config.image_size
        pixels = torch.cat([r.views(size, self._fit_of(r)) for r in references])
        with torch.no_grad():
            return encoder(pixels)[0]

    def _fit_of(self, reference: Reference) -> str:
        """What is seen of a reference: as the option says, or one from Python says itself."""
        return reference.fit if self.fit == "crop" else self.fit

    def _clip(self, encoder, references: list[Reference]) -> tuple[Tensor, Tensor]:
        """What diffusers feeds the projection, of the references and of none.

        Embeddings and zeros; or the last but one layer (Plus), of an image of zeros for none.
        """
        from transformers import CLIPImageProcessor

        size = encoder.config.image_size
        squares = [self._squares(r) for r in references]
        pixels = CLIPImageProcessor(size=size, crop_size=size)(
            [square for each in squares for square in each], return_tensors="pt"
        ).pixel_values
        pixels = pixels.to(encoder.device, encoder.dtype)
        with torch.no_grad():
            if type(self._adapter.projection).__name__ == "ImageProjection":
                embedding = encoder(pixels).image_embeds
                return embedding, torch.zeros_like(embedding)
            both = torch.cat([pixels, torch.zeros_like(pixels)])
            layer = encoder(both, output_hidden_states=True).hidden_states[-2]
        return layer.chunk(2)

    def _squares(self, reference: Reference) -> list[Image.Image]:
        """The reference as diffusers shows it to CLIP, which cuts the middle out itself."""
        if (fit := self._fit_of(reference)) == "crop":
            return [reference.image]
        side = min(reference.image.size) if fit == "crops" else max(reference.image.size)
        return [to_image(view / 2 + 0.5) for view in reference.views(side, fit)]

    def touches(self, branch: Branch) -> bool:
        """The adapter acts on every branch; the null sees no image."""
        return self._tokens is not None

    def edit_attention(self, step: Step, branch: Branch, call: AttentionCall) -> None:
        """Lets pixels read the reference's tokens beside the text."""
        if call.index > 0:
            return
        tokens = self._null if branch.null else self._tokens
        self._adapter.extend(call, tokens, self.scale)

    def branches(self, step: Step, branches: list[Branch]) -> list[Branch]:
        """A null branch, and the weight 1 + w of the conditional one."""
        if self._tokens is not None or self.w == 0:
            return branches
        cond = next(b for b in branches if b.name == "cond")
        cond.weight = 1 + self.scale * self.w
        prompts = [c.negative for c in step.run.conditions]
        return [Branch("null", prompts, null=True), *branches]

    @classmethod
    def example(cls) -> "Semantica":
        """An adapter that nobody trained, on a text-to-image model."""
        return cls(adapter=Path(RANDOM))

    @classmethod
    def example_condition(cls) -> Condition:
        """A prompt and a built-in reference."""
        return dataclasses.replace(super().example_condition(), image=load_reference("scene-3"))


@hookimpl
def register_guidance(register):
    """Offers `semantica`."""
    register("semantica", Semantica)
