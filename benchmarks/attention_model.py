"""Shapes of attention in denoisers, and a model of what they cost: bytes, FLOP, roofline."""

from dataclasses import dataclass

BANDWIDTH = 4.8e12  # bytes a second of an H200
RATE = 8e14  # bf16 FLOP a second that large products reach on it, of 9.9e14 on paper
COLUMNS = 4  # maps
CHOSEN = (1, 2, 3, 4, 5, 6)  # keys with weight


@dataclass(frozen=True)
class Shape:
    """Attention of one kind of layer; in joint attention, maps of the first `text` keys."""

    name: str
    layers: int
    h: int
    n: int
    t: int
    d: int
    text: int = 0
    mask: bool = False

    @property
    def joint(self) -> bool:
        return self.text > 0


SHAPES = [
    Shape("SD 1.5, 64x64", 5, 8, 4096, 77, 40),
    Shape("SD 1.5, 32x32", 5, 8, 1024, 77, 80),
    Shape("SD 1.5, 16x16", 5, 8, 256, 77, 160),
    Shape("SDXL, 64x64", 10, 10, 4096, 77, 64),
    Shape("SDXL, 32x32", 60, 20, 1024, 77, 64),
    Shape("PixArt, 64x64", 28, 16, 4096, 300, 72, mask=True),
    Shape("SD 1.5, 128x128", 5, 8, 16384, 77, 40),
    Shape("SD 3 medium", 24, 24, 4096 + 333, 4096 + 333, 64, text=333),
    Shape("Flux", 57, 24, 4096 + 512, 4096 + 512, 128, text=512),
]


def modelled(shape: Shape) -> list[dict]:
    """A row per method: megabytes, GFLOP and the roofline time of one layer. A model.

    16-bit tensors; P of eager methods in 16 bits, each pass over it counted; a product with P has
    2 H N T d FLOP. Stock backward kernels always compute dQ, dK and dV (five products of this
    size), ours dQ alone (three) in cross-attention, and in joint attention dQ and dK/dV (three
    and four, P and dP twice). Launches are not counted, and every product runs at one rate: a
    kernel that pads its head size is slower than its row (flash attention runs 72 as 96 and 136 as
    160, ours 40 as 64 and 72 or 80 as 128).
    """
    p, q, k = shape.h * shape.n * shape.t, shape.h * shape.n * shape.d, shape.h * shape.t * shape.d
    d, both = shape.d, 1 + shape.joint
    seen = shape.h * (shape.n - shape.text) * (shape.text or shape.t)  # part of P that maps read
    maps, small = 4 * shape.h * shape.n * COLUMNS, 3 * 2 * 16 * seen
    wide, one = (d + 8) / d, shape.t <= 128 and d <= 128  # one block of keys in backward
    stored = 2 * q + 4 * k if shape.joint else 2 * q + 2 * k  # gradients written, tensors read
    forward = {  # bytes, FLOP
        "SDPA, no maps": (4 * q + 4 * k, 4 * p * d),
        "eager": (4 * q + 4 * k + 10 * p, 4 * p * d + 2 * p),
        "SDPA + second softmax": (6 * q + 6 * k + 8 * p, 6 * p * d),
        "SDPA, augmented V": (wide * (8 * q + 10 * k) + maps, 4 * p * (d + 8)),
        "FlexAttention + lse": (6 * q + 4 * k + 4 * maps, 4 * p * d),
        "fused": (4 * q + 4 * k + maps, 4 * p * d + small),
    }
    back = {
        "SDPA, no maps": (6 * q + 4 * k + stored, 10 * p * d),
        "eager": (6 * q + 4 * k + stored + 12 * p, both * 4 * p * d),
        "SDPA + second softmax": (8 * q + 8 * k + 2 * stored + 10 * p, (10 + 2 * both) * p * d),
        "SDPA, augmented V": (wide * (10 * q + 8 * k + 2 * stored), 10 * p * (d + 8)),
        "FlexAttention + lse": (10 * q + 4 * k + stored + 8 * maps, 14 * p * d),
        "fused": (
            (4 if one else 6) * q + 4 * k + stored + maps + shape.joint * (4 * q + 4 * k),
            (14 if shape.joint else 6) * p * d + both * small,
        ),
    }
    if shape.joint and not shape.mask:
        # The floor, then passes of their own: fp32 copies of Q; O', dO' and dQ once more.
        (fb, ff), (bb, bf) = forward["SDPA, no maps"], back["SDPA, no maps"]
        few = shape.h * (shape.n - shape.text) * len(CHOSEN)
        forward["vendor + columns"] = fb + 10 * q + 12 * few, ff + 2 * d * few
        back["vendor + columns"] = bb + 36 * q + 24 * few, bf + 6 * d * few
    rows = []
    for name in forward:
        (fb, ff), (bb, bf) = forward[name], back[name]
        roof = max(fb / BANDWIDTH, ff / RATE) + max(bb / BANDWIDTH, bf / RATE)
        if name == "vendor + columns":
            roof += (fb + bb - forward["SDPA, no maps"][0] - back["SDPA, no maps"][0]) / BANDWIDTH
        rows.append(
            {
                "shape": shape.name,
                "method": name,
                "forward MB": fb / 1e6,
                "forward GFLOP": ff / 1e9,
                "backward MB": bb / 1e6,
                "backward GFLOP": bf / 1e9,
                "model us": 1e6 * roof,
                "all layers, model ms": 1e3 * shape.layers * roof,
            }
        )
    return rows
