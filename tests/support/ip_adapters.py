"""Random weights in the forms of published IP-Adapters, and a random tower of CLIP."""

import torch


def published(unet, embedding=24, count=4):
    """Random weights in the form of a published IP-Adapter."""
    generator, width = torch.Generator().manual_seed(0), unet.config.cross_attention_dim

    def random(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    weights = {
        "image_proj.proj.weight": random(count * width, embedding),
        "image_proj.proj.bias": random(count * width),
        "image_proj.norm.weight": 1 + random(width),
        "image_proj.norm.bias": random(width),
    }
    sites = [n for n in unet.attn_processors if n.endswith("attn2.processor")]
    for index, name in enumerate(sites):
        inner = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for kind in "kv":
            weights[f"ip_adapter.{2 * index + 1}.to_{kind}_ip.weight"] = random(inner, width)
    return weights


def plus(unet, channels=16):
    """Random weights in the form of a published IP-Adapter Plus: a resampler of all tokens."""
    width, inner = unet.config.cross_attention_dim, 64
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "latents": (1, 4, inner),
        "proj_in.weight": (inner, channels),
        "proj_in.bias": (inner,),
        "proj_out.weight": (width, inner),
        "proj_out.bias": (width,),
        "norm_out.weight": (width,),
        "norm_out.bias": (width,),
    }
    for i in range(4):
        for norm in ("0.norm1", "0.norm2", "1.0"):
            shapes |= {f"layers.{i}.{norm}.{part}": (inner,) for part in ("weight", "bias")}
        shapes |= {
            f"layers.{i}.0.to_q.weight": (inner, inner),
            f"layers.{i}.0.to_kv.weight": (2 * inner, inner),
            f"layers.{i}.0.to_out.weight": (inner, inner),
            f"layers.{i}.1.1.weight": (4 * inner, inner),
            f"layers.{i}.1.3.weight": (inner, 4 * inner),
        }
    resampler = {
        f"image_proj.{name}": torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        for name, shape in shapes.items()
    }
    attention = {k: v for k, v in published(unet).items() if k.startswith("ip_adapter")}
    return resampler | attention


def clip_tower(**changes):
    """A random image tower of CLIP."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = dict(
        hidden_size=16,
        intermediate_size=16,
        projection_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CLIPVisionModelWithProjection(CLIPVisionConfig(**config | changes)).eval()
