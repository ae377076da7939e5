"""Where a training's pages come from, how much disk they take, and how they become episodes."""

import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

from guidekit.errors import GuidekitError
from guidekit.semantica.data import Encoding, Store
from guidekit.semantica.encode import ImageEncoder, load_encoder
from guidekit.semantica.episodes import Episodes
from guidekit.semantica.groups import Ranks
from guidekit.semantica.growth import Bounds, Growth
from guidekit.semantica.pairs import HIGH, LOW, Filtered, check_bounds
from guidekit.semantica.sources import (
    PICTURES,
    Part,
    files_below,
    folder_parts,
    limited,
    scene_parts,
    shard_parts,
)
from guidekit.system.untrusted import read_object
from guidekit.train.identity import digest_of
from guidekit.train.processes import processes

QUANTILES = (0.02, 0.98)  # of the pairs' cosines, for encoders other than DINOv2
SOURCES = ("scenes", "labelled-scenes", "folder", "shards")
TOKENS = ("auto", "store", "train")


@dataclass(kw_only=True)
class PagesOptions:
    """Where episodes come from and which pairs are kept."""

    source: str = "scenes"  # scenes | labelled-scenes | folder | shards
    data: str = ""  # of folder: the root; of shards: a folder of .tar files
    page: str = "page_url"  # of shards: the column that says the page, or a label
    pages: int = 4000  # of scenes
    per_page: int = 4  # images of a page, of scenes
    polluted: float = 0.0  # share of a page's images that are of no page, of scenes
    without: tuple[str, ...] = ()  # objects that no page holds, of scenes
    encoder: str = "scenes-clip"  # see semantica.encode.load_encoder; or an earlier stage's folder
    low: float | None = None  # cosine between global features below which a pair is left out
    high: float | None = None  # and above which it is; -2 and 2 keep all
    # Two shares of all pairs that give low and high instead. Without any of the three DINOv2 has
    # low = 0.3, high = 0.9, the paper's; other encoders have quantiles = [0.02, 0.98].
    quantiles: tuple[float, ...] = ()
    store: str = ""  # folder of the encoded pages, by default beside the run
    tokens: str = (
        "auto"  # store: kept on disk | train: encoded at every step | auto: by tokens_most
    )
    tokens_most: float = 50.0
    threads: int = 4  # of each process that decode images
    limit: int = 0  # images that are read at most; 0 for all
    first: float = 1.0  # share of the source that is encoded before the first step
    grow: int = 1_000_000  # episodes after which twice as much of it counts, where first < 1

    def check_pages(self) -> None:
        """Raises GuidekitError for numbers that make no sense."""
        if self.tokens not in TOKENS:
            raise GuidekitError(f"tokens must be {' or '.join(TOKENS)}, not {self.tokens!r}")
        if not 0 < self.first <= 1:
            raise GuidekitError(f"first must be above 0 and at most 1, not {self.first:g}")
        if self.grow < 1 or self.limit < 0 or self.threads < 0:
            raise GuidekitError("grow must be 1 or more, limit and threads 0 or more")


def source_parts(options: PagesOptions, size: int, leave_out: tuple[Path, ...] = ()) -> list[Part]:
    """The parts of the source that the options name. Raises GuidekitError for what is missing.

    leave_out: folders inside a folder of pages that are none, such as the run's own.
    """
    if options.source not in SOURCES:
        raise GuidekitError(f"no source {options.source!r}; there are {', '.join(SOURCES)}")
    if options.source in ("scenes", "labelled-scenes"):
        more = {"polluted": options.polluted} if options.source == "scenes" else {}
        parts = scene_parts(
            options.pages,
            options.per_page,
            size,
            labelled=options.source == "labelled-scenes",
            without=tuple(options.without),
            **more,
        )
    elif not options.data:
        raise GuidekitError(f"source {options.source} needs data, the folder that it is in")
    elif options.source == "folder":
        parts = folder_parts(Path(options.data), leave_out)
    else:
        parts = shard_parts(_tars(options), options.page)
    return limited(parts, options.limit) if options.limit else parts


def _tars(options: PagesOptions) -> list[Path]:
    """The shards of the data's folder. Raises GuidekitError where there are none."""
    found = sorted(Path(options.data).glob("*.tar"))
    if not found:
        raise GuidekitError(f"no .tar files in {options.data}")
    return found


def image_count(options: PagesOptions) -> int:
    """About how many images the source has: of shards as the first one's size says."""
    if options.source in ("scenes", "labelled-scenes"):
        count = options.pages * options.per_page
    elif options.source == "folder":
        count = sum(p.suffix.lower() in PICTURES for p in files_below(Path(options.data)))
    else:
        tars = _tars(options)
        with tarfile.open(tars[0]) as tar:
            one = sum(Path(name).suffix.lower() in PICTURES for name in tar.getnames())
        total = sum(path.stat().st_size for path in tars)
        count = round(one * total / max(tars[0].stat().st_size, 1))
    return min(count, options.limit) if options.limit else count


def source_facts(options: PagesOptions, leave_out: tuple[Path, ...] = ()) -> dict:
    """What decides which images there are: options, and the files of the data."""
    names = ("source", "data", "page", "pages", "per_page", "polluted", "without", "limit")
    found = {n: list(v) if isinstance(v := getattr(options, n), tuple) else v for n in names}
    if not options.data:
        return found | {"files": ""}
    root = Path(options.data)
    paths = (path for path in files_below(root, leave_out) if path.is_file())
    return found | {"files": digest_of(root, paths)}


def data_facts(options: PagesOptions, folder: Path) -> dict[str, str]:
    """What decides a stage's weights beside its options: the files of its data."""
    if not (options.data and Path(options.data).is_dir()):
        return {}
    return {"files of data": source_facts(options, _away(options, folder))["files"]}


def _away(options: PagesOptions, folder: Path) -> tuple[Path, Path]:
    """Folders that are no data, though they may lie among them."""
    return folder, Path(options.store) if options.store else folder / "pages"


def bounds(options: PagesOptions, encoder: ImageEncoder) -> Bounds:
    """low, high and quantiles of the filter, by the encoder where none is given."""
    if len(options.quantiles) not in (0, 2):
        raise GuidekitError(f"quantiles are two numbers, not {len(options.quantiles)}")
    check_bounds(options.low, options.high, options.quantiles or None)
    if options.quantiles or (options.low, options.high) != (None, None):
        return options.low, options.high, options.quantiles or None
    if "dinov2" in encoder.source:
        return LOW, HIGH, None
    return None, None, QUANTILES


def make_episodes(
    options: PagesOptions, folder: Path, size: int, quiet: bool = False
) -> tuple[Episodes, ImageEncoder]:
    """Encoded and filtered pages of images of `size`, each process making its share.

    On several machines `folder` and `store` lie where all of them read.
    """
    own = folder / options.encoder
    name = own if (own / "config.json").exists() else options.encoder
    options.check_pages()
    encoder, state = load_encoder(name), processes()
    kept, away = bounds(options, encoder), _away(options, folder)
    store, quiet = away[1], quiet or not state.is_main_process
    parts = source_parts(options, size, away)
    how = Encoding(
        encoder.to(state.device),
        size,
        tokens=_keeps_tokens(options, encoder, store),
        threads=options.threads,
        process=state.process_index,
        processes=state.num_processes,
    )
    if not quiet:
        print(size_text(options, how, store), flush=True)
    growth = Growth(
        parts,
        how,
        store,
        folder / "filter",
        kept,
        source_facts(options, away),
        Ranks(state.process_index, state.num_processes, state.wait_for_everyone),
        options.first,
        options.grow,
        quiet,
        (lambda *found: None) if quiet else _tell,
    )
    episodes = growth.episodes()
    if growth.how.tokens and len(growth.counts) == 1:
        encoder.to("cpu")
    return episodes, encoder


def _keeps_tokens(options: PagesOptions, encoder: ImageEncoder, store: Path) -> bool:
    """Whether tokens are kept on disk: as asked, as it was begun, or where they fit."""
    if options.tokens != "auto":
        return options.tokens == "store"
    if (store / "pages.json").exists():
        return bool(read_object(store / "pages.json").get("tokens", True))
    tokens, channels, _ = encoder.shapes()
    return image_count(options) * tokens * channels * 2 <= options.tokens_most * 1e9


def size_text(options: PagesOptions, how: Encoding, store: Path) -> str:
    """How much disk the encoded pages will take, and how much there is."""
    count, each = image_count(options), how.row_bytes()
    there = next(path for path in (store, *store.resolve().parents) if path.exists())
    sizes = ", ".join(f"{name} {count * size / 1e9:.2f} GB" for name, size in each.items())
    tokens = "" if how.tokens else "; tokens are encoded at every step (tokens = train)"
    return (
        f"pages    about {count} images in {store}: {sizes}{tokens}; "
        f"{shutil.disk_usage(there).free / 1e9:.0f} GB are free"
    )


def _tell(store: Store, found: Filtered, folder: Path) -> None:
    totals = store.totals()
    print(
        f"pages    {totals['rows']} images, {totals['unreadable']} unreadable; "
        f"{found.share:.0%} of {found.total} pairs kept, {folder}/histogram.png",
        flush=True,
    )
