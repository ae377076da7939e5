"""Image files of every mode and depth, made in code, with the colours that each must show."""

import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

SIDE = 8
CHANCE = np.random.default_rng(0)
RGB = CHANCE.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
GREY = CHANCE.integers(0, 256, (SIDE, SIDE), np.uint8)
DEEP = CHANCE.integers(0, 65536, (SIDE, SIDE), np.uint16)
ALPHA = CHANCE.integers(0, 256, (SIDE, SIDE), np.uint8)
BITS = CHANCE.random((SIDE, SIDE)) < 0.5
INDEX = CHANCE.integers(0, 3, (SIDE, SIDE), np.uint8)
PALETTE = np.array([[250, 0, 10], [0, 200, 30], [7, 8, 9]], np.uint8)
FLAT = np.full((SIDE, SIDE, 4), (40, 90, 200, 30), np.uint8)  # of CMYK; JPEG keeps flat colours


def grey3(values: np.ndarray) -> np.ndarray:
    """Greys as colours."""
    return np.repeat(np.asarray(values).round().astype(np.uint8)[..., None], 3, -1)


def on_white(colours: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """Colours (H, W, 3) with an opacity of 255, over white."""
    share = opacity[..., None] / 255
    return (colours * share + 255 * (1 - share)).round().astype(np.uint8)


def ink(cmyk: np.ndarray) -> np.ndarray:
    """Colours of CMYK by its formula."""
    cmyk = cmyk.astype(float)
    return ((255 - cmyk[..., :3]) * (255 - cmyk[..., 3:]) / 255).round().astype(np.uint8)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    into = io.BytesIO()
    image.save(into, kind, **options)
    return into.getvalue()


def png(values: np.ndarray, colour: int, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG of 16 bits, as Pillow writes none in colour. colour: PNG's type of its bands."""
    rows = values.astype(">u2").reshape(len(values), -1)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour, 0, 0, 0)
    parts = [(b"IHDR", head), *more, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts
    )


def palette(**options) -> bytes:
    image = Image.fromarray(INDEX, "P")
    image.putpalette(PALETTE.flatten().tolist())
    return saved(image, "PNG", **options)


def ycck() -> tuple[bytes, np.ndarray]:
    """A flat JPEG whose Adobe mark says YCCK, and what it shows (Adobe's are inverted)."""
    data = bytearray(saved(Image.fromarray(FLAT, "CMYK"), "JPEG", quality=100))
    place = data.index(b"Adobe") + 11
    assert data[place] == 0
    data[place] = 2
    y, cb, cr, k = (255 - FLAT[0, 0]).astype(float)
    r, g = y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128)
    b = y + 1.772 * (cb - 128)
    shown = np.clip([r, g, b], 0, 255)  # inverted twice, so these are its inks
    cmyk = np.broadcast_to(np.append(shown, 255 - k), FLAT.shape)
    return bytes(data), ink(cmyk)


@dataclass(frozen=True)
class File:
    """A file with the colours (H, W, 3) that it must show, to so many levels."""

    suffix: str
    data: bytes
    shown: np.ndarray
    within: int = 0

    def write(self, folder: Path) -> Path:
        path = folder / f"image{self.suffix}"
        path.write_bytes(self.data)
        return path


def _frames(kind: str, **options) -> bytes:
    other = Image.fromarray(255 - RGB)
    return saved(Image.fromarray(RGB), kind, save_all=True, append_images=[other], **options)


def _gif() -> tuple[bytes, np.ndarray]:
    image = Image.fromarray(INDEX, "P")
    image.putpalette(PALETTE.flatten().tolist())
    other = Image.fromarray(2 - INDEX, "P")
    other.putpalette(PALETTE.flatten().tolist())
    data = saved(image, "GIF", save_all=True, append_images=[other], transparency=2, disposal=2)
    return data, on_white(PALETTE[INDEX], np.where(INDEX == 2, 0, 255))


def _turned(image: Image.Image, kind: str = "PNG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(image, kind, exif=exif)


def _table() -> dict[str, File]:
    f = File
    rgba, la = np.dstack([RGB, ALPHA]), np.dstack([GREY, ALPHA])
    image, tiff = Image.fromarray, "TIFF"
    opacities = np.array([0, 128, 255], np.uint8)
    wide = CHANCE.integers(0, 65536, (SIDE, SIDE, 4), np.uint16)
    deep3 = grey3(DEEP / 257)
    clear = np.where(DEEP[0, 0] == DEEP, 0, 255)
    smooth = np.broadcast_to(np.linspace(60, 180, SIDE).round(), (SIDE, SIDE)).astype(np.uint8)
    return {
        "1": f(".png", saved(image(BITS), "PNG"), grey3(BITS * 255)),
        "L": f(".png", saved(image(GREY), "PNG"), grey3(GREY)),
        "L, a clear grey": f(
            ".png",
            saved(image(GREY), "PNG", transparency=int(GREY[0, 0])),
            on_white(grey3(GREY), np.where(GREY[0, 0] == GREY, 0, 255)),
        ),
        "LA": f(".png", saved(image(la, "LA"), "PNG"), on_white(grey3(GREY), ALPHA), 1),
        "P": f(".png", palette(), PALETTE[INDEX]),
        "P, a clear index": f(
            ".png",
            palette(transparency=1),
            on_white(PALETTE[INDEX], np.where(INDEX == 1, 0, 255)),
        ),
        "P, opacities": f(
            ".png",
            palette(transparency=opacities.tobytes()),
            on_white(PALETTE[INDEX], opacities[INDEX]),
            1,
        ),
        "RGB": f(".png", saved(image(RGB), "PNG"), RGB),
        "RGB, a clear colour": f(
            ".png",
            saved(image(RGB), "PNG", transparency=tuple(map(int, RGB[0, 0]))),
            on_white(RGB, np.where((RGB[0, 0] == RGB).all(-1), 0, 255)),
        ),
        "RGBA": f(".png", saved(image(rgba), "PNG"), on_white(RGB, ALPHA), 1),
        "16 bits": f(".png", saved(image(DEEP), "PNG"), deep3),
        "16 bits, a clear grey": f(
            ".png",
            png(DEEP, 0, (b"tRNS", struct.pack(">H", DEEP[0, 0]))),
            on_white(deep3, clear),
        ),
        "16 bits, colour": f(".png", png(wide[..., :3], 2), (wide[..., :3] >> 8).astype(np.uint8)),
        "16 bits, RGBA": f(
            ".png",
            png(wide, 6),
            on_white((wide[..., :3] >> 8).astype(np.uint8), wide[..., 3] >> 8),
            1,
        ),
        "tiff 16 bits": f(".tif", saved(image(DEEP), tiff), deep3),
        "tiff 16 bits, big end first": f(
            ".tif",
            saved(Image.frombytes("I;16B", (SIDE, SIDE), DEEP.astype(">u2").tobytes()), tiff),
            deep3,
        ),
        "tiff 32 bits of 255": f(".tif", saved(image(GREY.astype(np.int32)), tiff), grey3(GREY)),
        "tiff 32 bits of 65535": f(".tif", saved(image(DEEP.astype(np.int32)), tiff), deep3),
        "tiff fractions of 1": f(
            ".tif", saved(image(GREY.astype(np.float32) / 255), tiff), grey3(GREY)
        ),
        "tiff fractions of 255": f(
            ".tif", saved(image(GREY.astype(np.float32)), tiff), grey3(GREY)
        ),
        "tiff 1": f(".tif", saved(image(BITS), tiff), grey3(BITS * 255)),
        "tiff RGBA": f(".tif", saved(image(rgba), tiff), on_white(RGB, ALPHA), 1),
        "tiff CMYK": f(".tif", saved(image(rgba, "CMYK"), tiff), ink(rgba), 1),
        "tiff YCbCr": f(
            ".tif", saved(image(RGB, "YCbCr"), tiff), np.array(image(RGB, "YCbCr").convert("RGB"))
        ),
        "jpeg": f(
            ".jpg",
            saved(image(np.repeat(smooth[..., None], 3, -1)), "JPEG", quality=100, subsampling=0),
            grey3(smooth),
            2,
        ),
        "jpeg L": f(".jpg", saved(image(smooth), "JPEG", quality=100), grey3(smooth), 2),
        "jpeg CMYK": f(".jpg", saved(image(FLAT, "CMYK"), "JPEG", quality=100), ink(FLAT), 2),
        "jpeg YCCK": f(".jpg", *ycck(), 3),
        "mpo": f(
            ".jpg",
            saved(
                image(smooth).convert("RGB"),
                "MPO",
                save_all=True,
                append_images=[image(GREY).convert("RGB")],
                quality=100,
            ),
            grey3(smooth),
            2,
        ),
        "gif, animated": f(".gif", *_gif()),
        "webp": f(".webp", saved(image(RGB), "WEBP", lossless=True), RGB),
        "webp RGBA": f(
            ".webp",
            saved(image(rgba), "WEBP", lossless=True, exact=True),
            on_white(RGB, ALPHA),
            1,
        ),
        "webp, animated": f(".webp", _frames("WEBP", lossless=True), RGB),
        "png, animated": f(".png", _frames("PNG"), RGB),
        "bmp": f(".bmp", saved(image(RGB), "BMP"), RGB),
        "bmp L": f(".bmp", saved(image(GREY), "BMP"), grey3(GREY)),
        "turned": f(".png", _turned(image(RGB)), np.rot90(RGB, -1)),
        "turned 16 bits": f(".png", _turned(image(DEEP)), np.rot90(deep3, -1)),
        "turned fractions": f(
            ".tif", _turned(image(GREY / np.float32(255)), tiff), np.rot90(grey3(GREY), -1)
        ),
        "turned RGBA": f(".png", _turned(image(rgba)), np.rot90(on_white(RGB, ALPHA), -1), 1),
    }


FILES = _table()
if int(PIL.__version__.partition(".")[0]) < 13:  # which cannot read the file that it writes
    del FILES["tiff YCbCr"]
