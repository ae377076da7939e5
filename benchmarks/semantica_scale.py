"""Semantica's pages at web scale: measured rates, and what 10^8 pages on 64 GPUs need by them.

Rows of noise stand for encoded images: three to a page, in chunks as the encoder writes them. Each
measurement is a process of its own, whose peak of resident memory is its own too.
"""

import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from fewshot_store import table
from guidekit.semantica.columns import packed, write_columns
from guidekit.semantica.data import (
    Encoding,
    Store,
    begin,
    chunk_name,
    write_pages,
)
from guidekit.semantica.encode import from_timm
from guidekit.semantica.episodes import Episodes
from guidekit.semantica.groups import find_pairs
from guidekit.semantica.sources import Item, Part, numbered
from measured import Results

WIDTH = 64  # of the rows' global features; DINOv2-B has 768
CHUNK, CHUNKS = 1024, 10  # rows of a chunk, chunks of a part, as img2dataset's shards have 10,000
PER_PAGE = 3
TEXT = 120  # characters of a caption
PAGES, GPUS, THREADS = 10**8, 64, 12  # of the computed table; threads that decode, per GPU
TOKENS, CHANNELS, SIDE, SEEN = 257, 768, 256, 224  # of DINOv2-B, and of the images kept


def write_rows(folder: Path, rows: int, seed: int) -> float:
    """Encoded pages of noise; returns the bytes on disk of a row."""
    begin(folder, {"tokens": False, "seen": False})
    total, done = 0, 0
    for number in range(-(-rows // CHUNK)):
        rng = np.random.Generator(np.random.Philox(key=[seed, number]))
        count = min(CHUNK, rows - done)
        # A page's images lie apart, as those of a web page do in a shuffled list of URLs.
        pages = (np.arange(done, done + count) * 7919 % rows) // PER_PAGE
        columns = {
            "page": (pages.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)).view(np.int64),
            "pooled": rng.standard_normal((count, WIDTH), np.float32).astype(np.float16),
            "pictures": rng.integers(0, 256, (count, 3, 1, 1), np.uint8),
        }
        for name, length in (("key", 24), ("caption", TEXT)):
            columns |= packed(name, ["x" * length] * count)
        part, chunk = divmod(number, CHUNKS)
        done += count
        first = part * CHUNKS * CHUNK
        facts = {"rows": done - first, "seen": done - first, "unreadable": 0, "next": done - first}
        facts["last"] = chunk == CHUNKS - 1 or done == rows
        path = folder / chunk_name(part, chunk)
        write_columns(path, columns, facts)
        total += path.stat().st_size
    return total / rows


def grouped(folder: Path) -> dict:
    """Groups and filters all rows."""
    start = time.perf_counter()
    found = find_pairs(Store(folder), -1.0, 1.0)
    seconds = time.perf_counter() - start
    index = sum(p.stat().st_size for p in (folder / "filter").glob("*.safetensors"))
    return {"group s": seconds, "pairs": found.kept, "index bytes": index}


def drawn(folder: Path, batches: int = 300, batch: int = 64) -> dict:
    """Opens what is there, as a resumed training does, and draws batches."""
    start = time.perf_counter()
    episodes = Episodes(Store(folder))
    rows = len(episodes.store)
    episodes.batch(range(10**6, 10**6 + batch), "pooled")
    begun = time.perf_counter() - start
    start = time.perf_counter()
    for number in range(batches):
        episodes.batch(range(number * batch, number * batch + batch), "pooled")
    spent = time.perf_counter() - start
    return {"start s": begun, "rows": rows, "episodes/s": batches * batch / spent}


def in_a_process(action: str, folder: Path) -> dict:
    """What an action of this script found, with the peak of its process's memory in MiB."""
    command = [sys.executable, __file__, "--action", action, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def resident(name: str) -> float:
    """MiB of this process in memory: VmRSS now, VmHWM at most (not its parent's, as getrusage)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def scale_row(rows: int, seed: int, keep: Path) -> dict:
    """Time and memory of grouping, starting and drawing with so many rows."""
    with tempfile.TemporaryDirectory(dir=keep) as folder:
        start = time.perf_counter()
        each = write_rows(Path(folder), rows, seed)
        row = {"rows": rows, "write s": time.perf_counter() - start, "bytes a row": each}
        group, draw = (in_a_process(name, Path(folder)) for name in ("grouped", "drawn"))
    row |= {"code MiB": group["code"], "group s": group["group s"], "group MiB": group["MiB"]}
    row |= {"index bytes a row": group["index bytes"] / rows}
    return (
        row
        | {"start s": draw["start s"], "draw MiB": draw["MiB"]}
        | {"episodes/s": draw["episodes/s"]}
    )


def photograph(seed: int) -> bytes:
    """A JPEG of 1024x768."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8))
    out = io.BytesIO()
    small.resize((1024, 768), Image.Resampling.BICUBIC).save(out, "JPEG", quality=88)
    return out.getvalue()


def encoder_of(model: str):
    """An encoder of timm's with random weights, which cost as much as trained ones."""
    more = {"img_size": SEEN} if "dinov2" in model else {}
    return from_timm(model, pretrained=False, **more)


def encode_rates(model: str, images: int, seed: int) -> dict:
    """Seconds of CPU to decode an image to both sizes, and images a second of the encoder here."""
    content = photograph(seed)
    items = [
        Item(str(i // PER_PAGE), str(i), lambda: Image.open(io.BytesIO(content)), "x" * TEXT)
        for i in range(images)
    ]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = encoder_of(model).to(device)
    how = Encoding(encoder, SIDE, batch=min(64, images), tokens=False)
    start = time.process_time()
    for item in items[:32]:
        with item.open() as image:
            how_decoded(image, how)
    decode = (time.process_time() - start) / len(items[:32])
    with tempfile.TemporaryDirectory() as folder:
        parts: list[Part] = [numbered("noise", lambda: iter(items))]
        write_pages(parts, how, Path(folder) / "warm")  # also what the first calls set up
        start = time.perf_counter()
        write_pages(parts, how, Path(folder) / "timed")
        whole = time.perf_counter() - start
    pixels = torch.zeros(how.batch, 3, SEEN, SEEN, device=device)
    calls = max(1, images // how.batch)
    with torch.no_grad():
        encoder(pixels)[1].cpu()
        start = time.perf_counter()
        for _ in range(calls):
            encoder(pixels)[1].cpu()
        rate = calls * how.batch / (time.perf_counter() - start)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder(pixels[:1])
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU {platform.machine()}"
    return {
        "decode ms": 1e3 * decode,
        "encode images/s": rate,
        "GFLOP an image": counter.get_total_flops() / 1e9,
        "device": name,
        "all images/s": images / whole,
    }


def how_decoded(image: Image.Image, how: Encoding) -> None:
    """Both squares of an image, as the writer makes them."""
    from guidekit.references import square

    for size in how.sizes:
        square(image, size)


@dataclass(frozen=True)
class Need:
    """What 10^8 pages need, by measured rates."""

    row: dict
    rates: dict
    tflops: float  # that a GPU makes of an encoder, where none was at hand to be measured
    images: int = PAGES * PER_PAGE

    @property
    def encode(self) -> tuple[float, str]:
        """Images a second of a GPU's encoder, and how that is known."""
        if self.rates["device"].startswith("CPU"):
            rate = self.tflops * 1e12 / (self.rates["GFLOP an image"] * 1e9)
            return rate, f"assumed {self.tflops:g} TFLOP/s a GPU"
        return self.rates["encode images/s"], f"measured on {self.rates['device']}"

    def table(self) -> list[dict]:
        """Rows of name, amount and unit."""
        images, row, rates = self.images, self.row, self.rates
        decode = images * rates["decode ms"] / 1e3 / (GPUS * THREADS)
        rate, known = self.encode
        encode = images / rate / GPUS
        wider = (2 * CHANNELS + 16) / (2 * WIDTH + 16)  # bytes dealt and read of a row
        group = images * row["group s"] / row["rows"] * wider / GPUS
        texts = row["bytes a row"] - 2 * WIDTH - 3
        disk = {
            "images kept": 3 * SIDE**2,
            "images as the encoder sees them": 3 * SEEN**2,
            "global features": 2 * CHANNELS,
            "pages, keys, captions": texts,
            "index": row["index bytes a row"],
        }
        found = [
            ("decode and resize", max(decode, 0.0) / 86400, "days"),
            (f"encode ({known})", encode / 86400, "days"),
            ("decoding and encoding, the slower of both", max(decode, encode) / 86400, "days"),
            ("first batch, of 1% of the parts", 0.01 * max(decode, encode) / 3600, "hours"),
            ("group and filter", group / 3600, "hours"),
            ("start and resume", row["start s"] * images / row["rows"] / 60, "minutes"),
            *((name, images * size / 1e12, "TB") for name, size in disk.items()),
            ("disk in all", images * sum(disk.values()) / 1e12, "TB"),
            ("while it is grouped, besides", images * (2 * CHANNELS + 16) / 1e12, "TB"),
            ("tokens, were they stored", images * 2 * TOKENS * CHANNELS / 1e12, "TB"),
            ("memory of a process, grouping", row["group MiB"] * 2**20 / 1e9, "GB"),
            ("memory of a process, drawing", row["draw MiB"] * 2**20 / 1e9, "GB"),
        ]
        return [{"what": name, "amount": amount, "unit": unit} for name, amount, unit in found]


def flat(rows: list[dict]) -> list[str]:
    """Whether memory and start-up hold what is promised."""
    said = []
    for name in ("group MiB", "draw MiB"):
        most = max(r[name] for r in rows) / min(r[name] for r in rows)
        said.append(f"{name}: {most - 1:.1%} from the least to the most rows (at most 10%)")
    last = rows[-1]
    minutes = last["start s"] / last["rows"] * 1e7
    said.append(f"start and resume: {minutes:.1f} s per 10^7 rows (at most 60)")
    return said


@click.command()
@click.option("--model", default="vit_base_patch14_dinov2", show_default=True, help="Of timm.")
@click.option("--quick", is_flag=True, help="10^4 and 10^5 rows, a small encoder.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--rates",
    type=click.Path(exists=True, path_type=Path),
    help="Encoder rates made before with --json.",
)
@click.option(
    "--keep", type=click.Path(path_type=Path), help="Where the rows are written; temporary."
)
@click.option("--tflops", default=100.0, show_default=True, help="Of an encoder, without a GPU.")
@click.option("--only-rates", is_flag=True, help="Decoding and encoding alone, as on a GPU.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write them here.")
@click.option("--action", type=click.Choice(["grouped", "drawn"]), hidden=True)
@click.option("--folder", type=click.Path(path_type=Path), hidden=True)
def main(model, quick, seed, rates, tflops, keep, only_rates, json_file, action, folder):
    """Prints measured rows, then what 10^8 pages on 64 GPUs need by them."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if action:
        code = resident("VmRSS")
        found = {"grouped": grouped, "drawn": drawn}[action](folder)
        print(json.dumps(found | {"MiB": resident("VmHWM"), "code": code}))
        return
    if quick and model == "vit_base_patch14_dinov2":
        model = "vit_small_patch14_dinov2"
    found = encode_rates(model, 64 if torch.cuda.is_available() else 8, seed)
    if rates:
        found = json.loads(rates.read_text())["rates"]
    rows, need = [], []
    if not only_rates:
        counts = (10**4, 10**5) if quick else (10**5, 10**6, 10**7)
        rows = [scale_row(count, seed, keep) for count in counts]
        need = Need(rows[-1], found, tflops).table()
        print(table(rows))
    print("\n" + table([{"encoder": model} | found]))
    if need:
        print(f"\n{PAGES:.0e} pages of {PER_PAGE} images on {GPUS} GPUs, {THREADS} threads each:")
        print(table(need))
    print(
        f"\nseed {seed}, chunks of {CHUNK} rows, features of {WIDTH}, torch {torch.__version__}, "
        f"{os.cpu_count()} {platform.machine()} cores, one thread"
    )
    results = Results(json_file, model=model, seed=seed, rates=found)
    results.extend({"part": "measured"} | row for row in rows)
    results.extend({"part": "needed"} | row for row in need)
    results.say(*(flat(rows) if rows else []))
    results.finish()


if __name__ == "__main__":
    main()
