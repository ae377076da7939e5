"""`guidekit sample --plan` and `--count`: this process's part of a plan."""

import os
import re
from pathlib import Path
from typing import Any

from guidekit.cli.plan import check_settings, condition_of, guidance_options
from guidekit.cli.scale.block_plan import (
    make_block_plan,
    read_block_plan,
    save_plan_files,
)
from guidekit.cli.scale.drawer import Drawer
from guidekit.cli.scale.store import PLAN, Store
from guidekit.cli.scale.worker import Worker
from guidekit.cli.settings import Settings
from guidekit.cli.terminal import images, say
from guidekit.errors import GuidekitError
from guidekit.system.progress import Progress

OF_PLANS = ("count", "block", "form")


def draw_plan(path: Path, flags: dict[str, Any], silent: bool) -> dict[str, Any]:
    """Draws blocks of a plan that is written; flags: out, shard and device."""
    plan = read_block_plan(path)
    if flags["out"] is None and not _is_begun(path):
        raise GuidekitError("name the folder of the plan's images, for all processes, with --out")
    folder = flags["out"] or (path if path.is_dir() else path.parent)
    return _draw(Store.make(folder, plan), flags, silent)


def _is_begun(path: Path) -> bool:
    """Whether it is the folder of a plan that was begun, or the plan in it."""
    folder = path if path.is_dir() else path.parent
    return (folder / PLAN).exists() and (folder / "state").is_dir()


def draw_count(settings: Settings, flags: dict[str, Any], silent: bool) -> dict[str, Any]:
    """Draws blocks of the plan that the settings and `count` make; the same again goes on."""
    if settings.out is None:
        raise GuidekitError("name the folder of the images, for all processes, with --out")
    if settings.image_folder is not None:
        raise GuidekitError(
            'image_folder is not for --count; write a plan with "conditions": [{"image": "a.png"}]'
        )
    if flags["seeds"] is not None and len(settings.seeds) > 1:
        raise GuidekitError(f"with --count, --seeds is the first: --seeds {settings.seeds[0]}")
    check_settings(settings)
    condition = condition_of(settings)
    resolved = guidance_options(settings, flags["no_plugin"])
    values = {name: flags[name] for name in OF_PLANS if flags[name] is not None}
    plan = make_block_plan(resolved, condition, folder=settings.out, **values)
    store = Store.make(settings.out, plan, lambda out: save_plan_files(settings, condition, out))
    return _draw(store, flags, silent)


def _draw(store: Store, flags: dict[str, Any], silent: bool) -> dict[str, Any]:
    """Draws until no block is free; what came of it."""
    silent = silent or os.environ.get("RANK", "0") != "0"
    plan = store.plan
    if not silent:
        blocks = f"{len(plan.blocks)} blocks of {plan.block}"
        say(f"plan     {plan.identity}: {images(plan.count)} in {blocks}, into {store.folder}/")
    drawer = Drawer(store, _device(flags["device"]), flags["no_plugin"])
    with Progress(unit="image", silent=silent) as progress:
        worker = Worker(store, drawer, _shard(flags["shard"]), progress)
        try:
            worker.run()
        finally:
            manifest = store.write_manifest()
    if manifest["complete"]:
        store.tidy()
    return _told(worker, manifest, silent)


def _told(worker: Worker, manifest: dict[str, Any], silent: bool) -> dict[str, Any]:
    """Says what came of it. Raises GuidekitError for blocks that failed here.

    Not where a launcher started several processes: it would end the others.
    """
    store, drawn = worker.store, worker.drawn
    if not silent:
        say(f"wrote    {store.folder}/: {images(drawn)} now, {manifest['images']} of them all")
        if waiting := worker.left - len(worker.failed):
            say(f"left     {waiting} blocks that other processes draw, or that failed there")
    if worker.failed:
        number, error = next(iter(worker.failed.items()))
        text = (
            f"{len(worker.failed)} of {len(store.plan.blocks)} blocks failed, the first, {number}, "
            f"by {type(error).__name__}: {error}; guidekit status {store.folder} lists them, and "
            "the same command tries them again"
        )
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise GuidekitError(text)
        say(f"failed   {text}", err=True)
    facts = {key: manifest[key] for key in ("plan", "images", "count", "complete")}
    return {"drawn": drawn, "failed": sorted(worker.failed), **facts}


def _shard(text: str | None) -> tuple[int, int]:
    """A share such as 2/8."""
    if text is None:
        return 1, 1
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if match is None:
        raise GuidekitError(f"--shard {text}: write which of how many, from 1, such as 2/8")
    return int(match[1]), int(match[2])


def _device(given: str | None) -> str | None:
    """The device of a process: the n-th GPU for the n-th that torchrun or accelerate started."""
    import torch

    if given is not None or "LOCAL_RANK" not in os.environ or not torch.cuda.is_available():
        return given
    return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
