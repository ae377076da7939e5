"""Encoders of texts in the form of sentence-transformers: a transformer, and what pools its states.

`modules.json` names the modules in their order, `1_Pooling/config.json` the way of pooling.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from guidekit.backbones.loading import LOAD_ERRORS, check_part, quiet
from guidekit.errors import GuidekitError
from guidekit.system.untrusted import check_configs, inside, read_json, read_object

MODULES = "modules.json"
KNOWN = ("Transformer", "Pooling", "Normalize")  # the last changes no cosine
WAYS = ("cls_token", "mean_tokens")
MODE = "pooling_mode_"


def sentence_texts(folder: Path) -> Callable[[list[str]], Tensor]:
    """The encoder of a folder, texts to (N, D).

    Raises GuidekitError for modules and ways of pooling that are not known here, for pickles, and
    for what cannot be loaded.
    """
    import transformers

    own, way = _modules(folder)
    check_configs(own)
    check_part(own)
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(own)
            model = transformers.AutoModel.from_pretrained(own, use_safetensors=True).eval()
    except LOAD_ERRORS as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise GuidekitError(f"text encoder {folder} cannot be loaded: {first}") from None

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        states, real = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
        if way == "cls_token":
            return states[:, 0]
        return (states * real).sum(1) / real.sum(1)

    return encode


def _modules(folder: Path) -> tuple[Path, str]:
    """The folder of the transformer, and how its states are pooled."""
    try:
        rows = read_json(folder / MODULES)
        places = {row["type"].rpartition(".")[2]: row["path"] for row in rows}
    except (KeyError, TypeError, AttributeError):
        raise GuidekitError(f"{folder / MODULES} is damaged; download it again") from None
    if not {*KNOWN[:2]} <= {*places} <= {*KNOWN}:
        raise GuidekitError(
            f"text encoder {folder} has {', '.join(places)}, and what is known here is "
            f"{', '.join(KNOWN)}; give one of these, or a CLIP"
        )
    own, pooling = (_place(folder, places[kind]) for kind in KNOWN[:2])
    modes = [key.removeprefix(MODE) for key, on in read_object(pooling / "config.json").items()
             if key.startswith(MODE) and on is True]  # fmt: skip
    if len(modes) != 1 or modes[0] not in WAYS:
        raise GuidekitError(
            f"text encoder {folder} pools by {', '.join(modes) or 'nothing that it names'}; known "
            f"are {' or '.join(WAYS)} alone, so give another, or a CLIP"
        )
    return own, modes[0]


def _place(folder: Path, name: object) -> Path:
    """The folder of a module; that of the first one is often the encoder's own."""
    return inside(folder, name, "the module") if name else folder
