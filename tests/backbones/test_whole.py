"""Models whose files lack weights are refused, not drawn with random ones."""

import logging
import shutil

import pytest
import transformers
from safetensors.torch import load_file, save_file

import guidekit
from guidekit import GuidekitError
from guidekit.backbones.whole import whole

PARTS = {
    "text_encoder": ("model", "CLIPTextModel"),
    "unet": ("diffusion_pytorch_model", "UNet2DConditionModel"),
}


@pytest.fixture
def damaged(model, tmp_path):
    """A function (part, renamed) -> the model's folder, a tensor of a part lost or renamed."""

    def damage(part: str, prefix: str | None = None):
        folder = shutil.copytree(model, tmp_path / "damaged")
        (file,) = (folder / part).glob(f"{PARTS[part][0]}.safetensors")
        tensors = load_file(file)
        if prefix is None:
            tensors.popitem()
        else:
            tensors = {f"{prefix}{name}": value for name, value in tensors.items()}
        save_file(tensors, file, {"format": "pt"})
        return folder

    return damage


@pytest.fixture
def verbosity():
    """Sets how much transformers says, which the command line leaves at errors."""
    before = transformers.logging.get_verbosity()
    yield transformers.logging.set_verbosity
    transformers.logging.set_verbosity(before)


@pytest.mark.parametrize("part", PARTS)
def test_a_lost_tensor_is_refused(damaged, part, verbosity):
    verbosity(logging.ERROR)
    with pytest.raises(GuidekitError, match=f"cannot be loaded: .*{PARTS[part][1]}"):
        guidekit.load(str(damaged(part)))


def test_names_of_another_version_are_refused(damaged):
    with pytest.raises(GuidekitError, match="lack weights of CLIPTextModel, or name them as"):
        guidekit.load(str(damaged("text_encoder", "other.")))


@pytest.mark.parametrize("own, expected", [("warning", ["a warning"]), ("error", [])])
def test_the_users_loggers_stay_as_they_are(verbosity, own, expected):
    verbosity(getattr(logging, own.upper()))
    shown: list[str] = []
    logger = logging.getLogger("transformers")
    handlers, level = list(logger.handlers), logger.level
    watch = logging.Handler()
    watch.emit = lambda record: shown.append(record.getMessage())
    logger.addHandler(watch)
    try:
        with whole():
            logging.getLogger("transformers.modeling_utils").warning("a warning")
            logging.getLogger("transformers.modeling_utils").info("a detail")
        assert logger.handlers == [*handlers, watch]
    finally:
        logger.removeHandler(watch)
    assert logger.level == level
    assert shown == expected
