"""Folding: the folded layer on a target map is the layer on the map that stands for it."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, T2IAdapter
from torch import nn

import tiny
from guidekit import GuidekitError, LabelMap, LabelSet
from guidekit.affinity import Affinity, fold, fold_state
from guidekit.testing import conditioners

SOURCES, TARGETS = 7, 4
COLOURS = tuple((37 * i % 256, 91 * i % 256, 151 * i % 256) for i in range(1, SOURCES + 1))
SOURCE = LabelSet("source", tuple("abcdefg"), COLOURS)
TARGET = LabelSet("target", tuple("wxyz"), ((255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)))
HARD = torch.tensor([5, 0, 0, 3])
DRAWS = torch.Generator().manual_seed(0)
IDS = torch.randint(0, TARGETS, (16, 16), generator=DRAWS)
MAP = LabelMap(IDS, TARGET)
SOURCE_MAP = LabelMap(HARD[IDS], SOURCE)
SOFT = torch.rand(SOURCES, TARGETS, generator=DRAWS, dtype=torch.float64)
SOFT /= SOFT.sum(0)


def matrix():
    return F.one_hot(HARD, SOURCES).T.double()


def close(folded, expected):
    assert (folded - expected).abs().max() <= 1e-6 * expected.abs().max()


class OneHot(nn.Module):
    """A UNet's first layer on an image with the map behind it."""

    def __init__(self, classes):
        super().__init__()
        self.conv_in = nn.Conv2d(3 + classes, 8, 3, padding=1)

    def forward(self, y, image):
        return self.conv_in(torch.cat([image, y], 1))


class Spade(nn.Module):
    """SPADE's shared layer on the map: OASIS's channels before it, SDM's behind it."""

    def __init__(self, classes, noise=0, edges=1):
        super().__init__()
        self.fc = nn.Conv2d(noise + classes + edges, 8, 3, padding=1)
        shared = nn.Sequential(nn.Conv2d(noise + classes + edges, 8, 3, padding=1), nn.ReLU())
        self.up = nn.Module()
        self.up.mlp_shared = shared
        self.out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, *parts):
        y = torch.cat(parts, 1)
        return self.out(self.fc(y) + self.up.mlp_shared(y))


class Piti(nn.Module):
    """PITI's first layer, 7x7 on a map in colours from -1 to 1."""

    def __init__(self, channels):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.cnn = nn.Module()
        self.encoder.cnn.conv1 = nn.Conv2d(channels, 8, 7, padding=3)

    def forward(self, x):
        return self.encoder.cnn.conv1(x)


def refilled(build, state):
    """A model of the target's classes with the folded state."""
    model = build(TARGETS).double()
    model.load_state_dict(state)
    return model


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


@pytest.mark.parametrize("affinity", [matrix(), SOFT])
def test_one_hot_maps_behind_an_image(affinity):
    model, image = OneHot(SOURCES).double(), torch.randn(1, 3, 16, 16).double()
    y = MAP.one_hot()[None].double()
    folded = refilled(OneHot, fold_state(model.state_dict(), "one-hot", affinity))
    close(folded(y, image), model(torch.einsum("st,bthw->bshw", affinity, y), image))


@pytest.mark.parametrize("affinity", [matrix(), SOFT])
@pytest.mark.parametrize(
    "host, noise, edges", [("spade", 0, 2), ("oasis", 65, 0), ("oasis-cityscapes", 64, 1)]
)
def test_gans_keep_noise_before_and_edges_after_the_map(affinity, host, noise, edges):
    model = Spade(SOURCES, noise, edges).double()
    y = MAP.one_hot()[None].double()
    before, after = torch.randn(1, noise, 16, 16).double(), torch.randn(1, edges, 16, 16).double()
    state = fold_state(model.state_dict(), host, affinity)
    folded = refilled(lambda n: Spade(n, noise, edges), state)
    expected = model(before, torch.einsum("st,bthw->bshw", affinity, y), after)
    close(folded(before, y, after), expected)
    assert torch.equal(folded.out.weight, model.out.weight)


def pixels(label_map):
    values = torch.tensor(label_map.labels.palette)[label_map.ids].movedim(-1, 0)
    return values[None].double() / 255


def test_controlnet_reads_colours():
    net = conditioners.control_net(tiny.sd_pipeline()).double()
    state = fold_state(net.state_dict(), "controlnet", matrix(), SOURCE.colours)
    wide = ControlNetModel.from_config(net.config, conditioning_channels=TARGETS).double()
    wide.load_state_dict(state)
    expected = net.controlnet_cond_embedding(pixels(SOURCE_MAP))
    close(wide.controlnet_cond_embedding(MAP.one_hot()[None].double()), expected)


@pytest.mark.parametrize("build, side", [(tiny.sd_pipeline, 2), (tiny.sdxl_pipeline, 4)])
def test_t2i_adapter_reads_colours_in_blocks_of_pixels(build, side):
    adapter = conditioners.t2i_adapter(build()).double()
    given = ("t2i-adapter", matrix(), SOURCE.colours)
    state = fold_state(adapter.state_dict(), *given, unshuffle=side)
    wide = T2IAdapter.from_config(adapter.config, in_channels=TARGETS).double()
    wide.load_state_dict(state)
    expected = adapter(pixels(SOURCE_MAP))
    for folded, own in zip(wide(MAP.one_hot()[None].double()), expected, strict=True):
        close(folded, own)
    for wrong in (None, side // 2):  # None: 8, that of Stable Diffusion's
        with pytest.raises(GuidekitError, match=f"reads {3 * side**2} channels.*unshuffle=16"):
            fold_state(adapter.state_dict(), *given, unshuffle=wrong)


def test_published_t2i_adapters_have_blocks_of_8_and_of_16():
    """As many channels as those of Stable Diffusion and of SDXL; the second takes `unshuffle`."""
    wide = {"adapter.conv_in.weight": torch.randn(4, 3 * 256, 3, 3)}
    given = ("t2i-adapter", matrix(), SOURCE.colours)
    with pytest.raises(GuidekitError, match="no image in blocks of 8x8.*SDXL"):
        fold_state(wide, *given)
    folded = fold_state(wide, *given, unshuffle=16)["adapter.conv_in.weight"]
    assert folded.shape == (4, TARGETS * 256, 3, 3)
    narrow = {"adapter.conv_in.weight": torch.randn(4, 3 * 64, 3, 3)}
    assert fold_state(narrow, *given)["adapter.conv_in.weight"].shape[1] == TARGETS * 64


def test_piti_reads_signed_colours():
    model = Piti(3).double()
    state = fold_state(model.state_dict(), "piti", matrix(), SOURCE.colours)
    expected = model(2 * pixels(SOURCE_MAP) - 1)
    close(refilled(Piti, state)(MAP.one_hot()[None].double()), expected)


def test_an_affinity_folds_as_it_remaps():
    """`Affinity.fold` and `Affinity.remap` say the same, in float32 too."""
    by_hand = {t: F.one_hot(s, SOURCES).double() for t, s in enumerate(HARD)}
    found = Affinity(SOURCE, TARGET, {}, by_hand)
    weight = torch.randn(8, SOURCES, 3, 3)
    expected = F.conv2d(found.remap(MAP).one_hot()[None], weight, padding=1)
    close(F.conv2d(MAP.one_hot()[None], found.fold(weight), padding=1), expected)
    image, wide = torch.randn(1, 3, 16, 16), torch.randn(8, 3 + SOURCES, 3, 3)
    expected = F.conv2d(torch.cat([image, found.remap(MAP).one_hot()[None]], 1), wide, padding=1)
    folded = found.fold(wide, start="last")
    close(F.conv2d(torch.cat([image, MAP.one_hot()[None]], 1), folded, padding=1), expected)
    with pytest.raises(GuidekitError, match="where the map is if the layer reads more"):
        found.fold(wide)
    weight = torch.randn(8, 3, 3, 3)
    expected = F.conv2d(pixels(found.remap(MAP)).float(), weight, padding=1)
    folded = found.fold(weight, SOURCE.colours)
    assert folded.dtype == torch.float32
    close(F.conv2d(MAP.one_hot()[None], folded, padding=1), expected)


def test_what_does_not_fit_is_refused():
    state = OneHot(SOURCES).state_dict()
    for wrong, text in [
        (lambda: fold_state(state, "unet", matrix()), "no host 'unet'; there are one-hot, oasis"),
        (lambda: fold_state(state, "piti", matrix()), "reads colours: give the palette"),
        (lambda: fold_state(state, "one-hot", matrix(), SOURCE.colours), "reads no colours"),
        (lambda: fold_state({}, "spade", matrix()), "no weight is called fc.weight or"),
        (lambda: fold(torch.zeros(2, 5, 3, 3), matrix()), "reads 5 channels, and a map of 7"),
        (lambda: fold(torch.zeros(2, 3, 3, 3), SOFT, SOURCE.colours), "mixes the colours"),
    ]:
        with pytest.raises(GuidekitError, match=text):
            wrong()
