"""Blocks of a plan as rows of Ray Data, whose scheduler, retries and job checkpoints draw them.

    from guidekit import ray as guidekit_ray
    rows = guidekit_ray.draw("plan.json", "/shared/set", workers=8, num_gpus=1)
    rows.write_parquet("/shared/rows")

Needs `pip install guidekit[ray]`.
"""

import io
import tarfile
from pathlib import Path
from typing import Any

import ray

from guidekit.cli.scale.block_plan import read_block_plan
from guidekit.cli.scale.drawer import Drawer
from guidekit.cli.scale.store import Store
from guidekit.cli.scale.worker import drawn_by_someone


def blocks(plan: str | Path) -> ray.data.Dataset:
    """A row `{"id": number}` for each block of a plan.json; `id` is unique, for checkpoints."""
    return ray.data.range(len(read_block_plan(Path(plan)).blocks))


def draw(
    plan: str | Path, folder: str | Path, workers: int = 1, tars: bool = False, **resources: Any
) -> ray.data.Dataset:
    """A row `{"id", "images"}` for each block of a plan that is in `folder` once it is drawn.

    folder: as of `guidekit sample --out`, a path that all machines see; what is there is not drawn
    again, and `guidekit status` and `sample --plan` work on it too. tars: also the column `tar`,
    the block as bytes of a WebDataset tar. workers: processes that hold the model. resources: of
    each, such as num_gpus=1. A block that fails is written down as by `guidekit sample` and has no
    row, so that a checkpoint with `id_column="id"` does not take it for done. Raises GuidekitError
    for a plan that cannot be read or another one in the folder.
    """
    store = Store.make(Path(folder).resolve(), read_block_plan(Path(plan)))
    return blocks(plan).flat_map(
        _Worker,
        fn_constructor_args=(str(store.folder), tars),
        compute=ray.data.ActorPoolStrategy(size=workers),
        **resources,
    )


class _Worker:
    """An actor with the model; `guidekit.cli.scale.worker` is its like without Ray.

    Ray gives a block to one actor, but `guidekit sample --plan` may draw beside it, and an actor
    that was killed leaves halves: so a block is drawn under its lock, as there.
    """

    def __init__(self, folder: str, tars: bool):
        self.store = Store(Path(folder), read_block_plan(Path(folder)))
        self.drawer, self.tars = Drawer(self.store), tars

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        number = int(row["id"])
        if not drawn_by_someone(self.store, self.drawer, number):
            return []
        done = {"id": number, "images": len(self.store.plan.seeds(number))}
        return [done | {"tar": self._tar(number)} if self.tars else done]

    def _tar(self, number: int) -> bytes:
        place = self.store.place(number)
        if place.is_file():
            return place.read_bytes()
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as tar:
            for file in sorted(place.iterdir()):
                tar.add(file, file.name)
        return data.getvalue()
