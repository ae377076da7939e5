"""Encoders of open_clip and timm: tokens of every tower, files, and names that do not exist."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from guidekit.errors import GuidekitError
from guidekit.semantica.encode import (
    CLIP_CONFIG,
    CLIP_WEIGHTS,
    ImageEncoder,
    from_timm,
    load_encoder,
)


def test_open_clip_folders_and_saving(tmp_path):
    vision = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
    model = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}
    clip = open_clip.CLIP(12, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text))
    table = {"model_cfg": model, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / CLIP_CONFIG).write_text(json.dumps(table))
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, tmp_path / CLIP_WEIGHTS)
    encoder = load_encoder(tmp_path)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    tokens, pooled = encoder(pixels)
    assert encoder.shapes() == (4, 16, 12)
    assert tokens.shape == (2, 4, 16)
    torch.testing.assert_close(pooled, clip.eval().encode_image(pixels))
    encoder.save_pretrained(tmp_path / "saved")
    again = load_encoder(tmp_path / "saved")
    assert torch.equal(again(pixels)[0], tokens)
    assert again.source == str(tmp_path)


def test_timm_convolutions_and_windows_have_tokens_too():
    encoder = from_timm("test_resnet", pretrained=False)
    tokens, channels, pooled = encoder.shapes()
    assert tokens > 1
    assert channels == pooled
    windows = dict(img_size=32, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4)
    swin = from_timm("swin_tiny_patch4_window7_224", pretrained=False, **windows)
    assert swin.shapes() == (4 * 4, 16, 16)


@pytest.mark.parametrize(
    "vision, tokens",
    [
        (dict(layers=[1, 1, 1, 1], width=8, head_width=32, image_size=64), (4, 256)),
        (dict(timm_model_name="test_vit", timm_pool="avg", image_size=160), (101, 64)),
        (dict(timm_model_name="test_convnext", timm_pool="", image_size=64), (4, 64)),
    ],
    ids=["resnet", "timm-vit", "timm-convnext"],
)
def test_every_tower_of_open_clip_has_tokens(vision, tokens):
    mean = (0.5,) * 3
    settings = {"embed_dim": 12, "vision_cfg": vision}
    encoder = ImageEncoder("open_clip", "", settings, vision["image_size"], mean, mean)
    assert encoder.shapes() == (*tokens, 12)
    pixels = torch.rand(2, 3, vision["image_size"], vision["image_size"]) * 2 - 1
    torch.testing.assert_close(encoder(pixels)[1], encoder.net(pixels))


def test_unknown_encoders():
    with pytest.raises(GuidekitError, match="there are dinov2-b, dinov2-l, siglip-b"):
        load_encoder("dino")
    with pytest.raises(GuidekitError, match="timm has no model"):
        load_encoder("timm/vit_of_nobody")
    with pytest.raises(GuidekitError, match="open_clip has no model"):
        load_encoder("open_clip/ViT-of-nobody/tag")
    with pytest.raises(
        GuidekitError, match="no weights 'test_vit.nope'; there are test_vit.r160_in1k"
    ):
        load_encoder("timm/test_vit.nope")
    with pytest.raises(GuidekitError, match="no weights 'nope' of RN50; there are openai"):
        load_encoder("open_clip/RN50/nope")
