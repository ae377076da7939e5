"""Semantica: draw another picture with the semantics of a reference picture.

Kumar, Fischer, Greff, Weissenborn, Houlsby: Conditional diffusion on web-scale image pairs,
2024, arXiv:2405.14857. With a Semantica model the reference is its condition and this adds the
guidance (1 + w) cond - w null. With a text-to-image backbone an adapter adds the reference's tokens
as further keys and values of cross-attention (IP-Adapter, Ye et al. 2023, arXiv:2308.06721).
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from guidekit import (
    AttentionCall,
    Branch,
    Condition,
    Guidance,
    Reference,
    Run,
    Step,
    hookimpl,
    load_reference,
)
from guidekit.config import ZOO
from guidekit.loading import LOAD_ERRORS
from guidekit.pictures import to_image
from guidekit.references import square
from guidekit.semantica.adapter import SITES, load_adapter, random_adapter
from guidekit.untrusted import check_configs

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection

    from guidekit.semantica.encode import ImageEncoder

RANDOM = "random"  # the name of an adapter that nobody trained


@dataclass(kw_only=True)
class Semantica(Guidance):
    """Follows the reference picture of `--image`."""

    scale: float = 1.0  # strength: of the adapter's tokens, or a factor of w
    w: float = 0.5  # of a Semantica model: guidance, (1 + w) cond - w null
    adapter: Path | None = None  # of text-to-image: folder, or IP-Adapter .safetensors; or none
    encoder: str = ""  # of the adapter: what encodes the reference; "" is the adapter's own

    reads_image: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.w < float("inf"):  # nan is not either
            raise ValueError(
                f"{self.name}.w is a finite guidance factor of at least 0, not {self.w}"
            )
        self.encoder = _settled(self.encoder)

    @property
    def needs(self) -> tuple[str, ...]:
        """An adapter's tokens are read beside those of a prompt."""
        return () if self.adapter is None else ("text", "cross-attention")

    def prepare(self, run: Run) -> None:
        """Finds out which of its two forms the model has, and encodes the references."""
        if any(condition.image is None for condition in run.conditions):
            raise ValueError(f"{self.name} follows a picture: give --image ref.png")
        self._tokens: Tensor | None = None
        if run.denoiser.reads_image:
            if run.denoiser.model.config.conditioning == "none":
                raise ValueError(
                    f"{self.name} follows a picture and this model was trained without any; "
                    "take one of conditioning tokens or film"
                )
            if run.cfg > 1:
                raise ValueError(f"give cfg or {self.name}.w, not both: cfg is 1 + w")
            return
        if self.adapter is None:
            raise ValueError(
                f"{self.name} needs an adapter for {type(run.denoiser.model).__name__}: set "
                f"{self.name}.adapter, or use a model such as scenes-semantica"
            )
        with torch.random.fork_rng(devices=[]):  # modules draw weights before they are loaded
            self._attach(run)

    def _attach(self, run: Run) -> None:
        """Tokens (B, T, D) of the references and of none, and the sites that read them."""
        from guidekit.semantica.encode import random_encoder  # timm and open_clip take seconds

        model = run.denoiser.model
        references = [condition.image for condition in run.conditions]
        if self.adapter.name == RANDOM and not self.adapter.exists():
            states = _tokens(random_encoder(), references)
            self._adapter, null = random_adapter(model, states.shape[-1]), torch.zeros_like(states)
        else:
            self._adapter = load_adapter(self.adapter, model)
            states, null = self._encoded(references, run)
        if states.shape[-1] != self._adapter.reads:
            raise ValueError(
                f"{self.name}.adapter {self.adapter} reads {self._adapter.reads} channels, the "
                f"picture encoder gives {states.shape[-1]}; set {self.name}.encoder to the one "
                "that it was trained with"
            )
        with torch.no_grad():
            self._tokens = self._adapter(states.to(run.device, model.dtype))
            self._null = self._adapter(null.to(run.device, model.dtype))
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
            raise ValueError(
                f"{self.name} needs the picture encoder of {self.adapter.name}: set "
                f"{self.name}.encoder to the folder of its CLIPVisionModelWithProjection"
            )
        if published:
            return self._clip(_load_clip(Path(name), f"{self.name}.encoder"), references)
        states = _tokens(load_encoder(name), references)
        return states, torch.zeros_like(states)

    def _clip(self, encoder, references: list[Reference]) -> tuple[Tensor, Tensor]:
        """What diffusers feeds the projection, of the references and of none.

        Embeddings and zeros; or the last but one layer (Plus), of a picture of zeros for none.
        """
        from transformers import CLIPImageProcessor

        size = encoder.config.image_size
        pixels = CLIPImageProcessor(size=size, crop_size=size)(
            [_opaque(r.picture) for r in references], return_tensors="pt"
        ).pixel_values
        pixels = pixels.to(encoder.device, encoder.dtype)
        with torch.no_grad():
            if type(self._adapter.projection).__name__ == "ImageProjection":
                embedding = encoder(pixels).image_embeds
                return embedding, torch.zeros_like(embedding)
            both = torch.cat([pixels, torch.zeros_like(pixels)])
            layer = encoder(both, output_hidden_states=True).hidden_states[-2]
        return layer.chunk(2)

    def touches(self, branch: Branch) -> bool:
        """The adapter acts on every branch; the null sees no picture."""
        return self._tokens is not None

    def edit_attention(self, step: Step, branch: Branch, call: AttentionCall) -> None:
        """Lets pixels read the reference's tokens beside the text."""
        if call.index > 0:
            return
        tokens = self._null if branch.null else self._tokens
        self._adapter.extend(call, tokens, self.scale)
        step.run.account.edit(self.name)

    def branches(self, step: Step, branches: list[Branch]) -> list[Branch]:
        """A null branch, and the weight 1 + w of the conditional one."""
        if self._tokens is not None or self.w == 0:
            return branches
        cond = next(b for b in branches if b.name == "cond")
        cond.weight = 1 + self.scale * self.w
        step.run.account.edit(self.name)
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


def _tokens(encoder: "ImageEncoder", references: list[Reference]) -> Tensor:
    """What an encoder says of the references, (B, T, D)."""
    pixels = torch.stack([r.pixels(encoder.config.image_size) for r in references])
    with torch.no_grad():
        return encoder(pixels)[0]


def _opaque(picture: Image.Image) -> Image.Image:
    """The picture as diffusers shows it to CLIP, but transparency is white, as elsewhere."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    return to_image(square(picture, min(picture.size)) / 255)


def _settled(encoder: str) -> str:
    """An encoder's name; a folder's is made absolute, so that run.json holds from anywhere."""
    built_in = (ZOO / encoder / "open_clip_config.json").exists()  # those come first, as in loading
    folder = encoder and not built_in and Path(encoder).is_dir()
    return str(Path(encoder).resolve()) if folder else encoder


def _load_clip(folder: Path, option: str) -> "CLIPVisionModelWithProjection":
    """A saved picture tower of CLIP; ValueError that names the folder, and others beside it."""
    from transformers import CLIPVisionModelWithProjection

    remedy = "give the folder of a CLIPVisionModelWithProjection with safetensors"
    if not (folder / "config.json").exists():
        others = sorted(p.parent.name for p in folder.parent.glob("*/config.json"))
        beside = f"; in {folder.parent.resolve()} there are {', '.join(others)}" if others else ""
        wrong = "has no config.json" if folder.is_dir() else "is no folder"
        raise ValueError(f"{option} {folder} {wrong}; {remedy}{beside}")
    check_configs(folder)
    try:
        encoder, found = CLIPVisionModelWithProjection.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True
        )
    except (*LOAD_ERRORS, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{option} {folder} cannot be loaded: {first}; {remedy}") from None
    if missing := found["missing_keys"]:  # transformers leaves them random
        raise ValueError(f"{option} {folder} lacks {min(missing)}; {remedy}")
    return encoder


@hookimpl
def register_guidance(register):
    """Offers `semantica`."""
    register("semantica", Semantica)
