"""The private names of diffusers, accelerate and torch that guidekit uses: all, and all there.

A release of theirs may drop one without a word; this names it at once.
"""

import ast
import importlib
import importlib.metadata
from operator import attrgetter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [
    path for part in ("guidekit", "plugins", "kernels") for path in (ROOT / part).rglob("*.py")
]

# The module and what in it has the name.
USED = {
    "_AttentionBackendRegistry": "diffusers.models.attention_dispatch",
    "_convert_ip_adapter_image_proj_to_diffusers": "diffusers UNet2DConditionModel",
    "_execution_device": "diffusers DiffusionPipeline",
    "_version": "torch Tensor",
    "_get_add_time_ids": "diffusers StableDiffusionXLPipeline",
    "_get_gemma_prompt_embeds": "diffusers Lumina2Pipeline",
    "_get_variance": "diffusers DDPMScheduler",
    "_gradient_checkpointing_func": "diffusers ModelMixin",
    "_helpers": "diffusers.hooks",
    "_is_mkldnn_bf16_supported": "torch ops.mkldnn",
    "_prepare_latent_image_ids": "diffusers FluxPipeline",
    "_python_dispatch": "torch.utils",
    "_reset_state": "accelerate.state AcceleratorState",
    "_sigma_to_alpha_sigma_t": "diffusers DPMSolverMultistepScheduler",
    "_text_preprocessing": "diffusers PixArtAlphaPipeline",
    "_to_copy": "torch ops.aten",
}


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _names() -> tuple[set[str], set[str]]:
    """Private names that the sources define or set, and those that they use or import."""
    defined, used = set(), set()
    for node in (node for path in FILES for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Attribute):
            (defined if isinstance(node.ctx, ast.Store) else used).add(node.attr)
        elif isinstance(node, ast.ImportFrom) and not node.module.startswith("guidekit"):
            used |= {*node.module.split("."), *(alias.name for alias in node.names)}
    return defined, set(filter(_private, used))


def test_every_foreign_private_name_is_in_the_table():
    defined, used = _names()
    assert used - defined - {"_name"} <= USED.keys()  # the registry sets `_name` by vars()
    assert USED.keys() <= used, "the table names what nobody uses"


@pytest.mark.parametrize("name", USED)
def test_the_installed_version_has_it(name):
    module, _, owner = USED[name].partition(" ")
    package = module.partition(".")[0]
    found = importlib.import_module(module)
    if owner:
        found = attrgetter(owner)(found)
    if name == "_gradient_checkpointing_func":  # set by __init__
        found = found()
    version = importlib.metadata.version(package)
    assert hasattr(found, name), f"{package} {version} has no {owner or module}.{name}"
