"""What a server offers and how much of it: everything that a request may name is here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that one request, and all of them together, may ask for."""

    #: Pixels of an image's longer side.
    side: int = 1024
    #: Denoising steps.
    steps: int = 250
    #: Images of one run.
    images: int = 16
    #: Draws of an image that a plugin rejects.
    tries: int = 8
    #: Cells of a grid.
    cells: int = 25
    #: Segments of a layout.
    segments: int = 32
    #: Controls of a run.
    controls: int = 4
    #: Classes of a label map.
    classes: int = 1024
    #: Runs that wait.
    queue: int = 64
    #: Runs whose events are kept; the files of older ones stay in their folders.
    kept: int = 500
    #: Bytes of the requests of all runs whose events are kept.
    held: int = 256 << 20
    #: Listeners to events, all together.
    streams: int = 64
    #: Bytes of a request.
    body: int = 16 << 20
    #: Pixels of an image file in a request.
    pixels: int = 4096 * 4096
    #: Pixels of the masks of all segments together.
    masks: int = 4 * 4096 * 4096
    #: Characters of a prompt or a phrase.
    text: int = 10_000
    #: Steps of a run whose events are kept; of more, those at equal distances.
    events: int = 20_000


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What `guidekit serve` was started with."""

    #: Models that a request may name, the first being the page's own.
    models: tuple[str, ...]
    #: Plugins that a request may name; they are imported when the server starts.
    plugins: tuple[str, ...]
    #: Where runs are written, a folder each.
    out: Path
    #: Files and folders that options of plugins may name, such as a head.
    files: Mapping[str, Path] = field(default_factory=dict)
    #: Folders of ControlNets and T2I-Adapters that a request may attach.
    controls: Mapping[str, Path] = field(default_factory=dict)
    device: str | None = None
    dtype: str | None = None
    #: The address to listen at.
    host: str = "127.0.0.1"
    #: What a browser may call this server, beside addresses and localhost.
    names: tuple[str, ...] = ()
    #: What a client must know; None for no token.
    token: str | None = None
    #: Steps from one preview to the next; 0 for none.
    preview: int = 3
    limits: Limits = Limits()
