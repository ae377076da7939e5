"""How many objects can be read from an encoder's tokens? A reader is trained on frozen ones."""

import numpy as np
import torch
from tqdm import tqdm

from guidekit.evaluate import judge as evaluate
from guidekit.semantica.tags import TagLoss, TagsOptions, TagsTask, held
from guidekit.worlds import scenes
from guidekit.zoo.shipped import ZOO

ENCODERS = {
    "scenes-clip": "scenes-clip",
    "scenes-semantica's": str(ZOO / "scenes-semantica" / "encoder"),
}
BATCH = 64


def reader(encoder: str, size: int, steps: int) -> TagLoss:
    """One query an object, trained on the tokens of an encoder that stays as it is."""
    torch.manual_seed(0)
    task = TagsTask(TagsOptions(encoder=encoder), size)
    task.net.encoder.eval().requires_grad_(False)
    weights = [p for p in task.net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, 2e-3, weight_decay=0.02)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for step in tqdm(range(steps), desc=encoder, leave=False):
        batch = task.batch(range(BATCH * step, BATCH * (step + 1)), torch.Generator())
        optimizer.zero_grad()
        task.net(**batch)["tags"].backward()
        optimizer.step()
        rate.step()
    return task.net


def reader_rows(n: int, size: int, steps: int) -> list[dict]:
    """Share of n held-out images whose set of objects is read exactly, by number of objects."""
    plans = [scenes.scene(i, "test") for i in range(n)]
    pixels, wanted = scenes.batch(plans, size)[0], held(plans).bool()
    count, rows = wanted.sum(1).numpy(), []
    for name, encoder in ENCODERS.items():
        net = reader(encoder, size, steps)
        with torch.no_grad():
            found = torch.cat([net.logits(part) for part in pixels.split(100)]) > 0
        exact = (found == wanted).all(1).numpy().astype(float)
        row = {"method": f"read from {name}", "n": n, "exact": float(exact.mean())}
        row["exact_interval"] = evaluate.interval(lambda i, e=exact: float(e[i].mean()), n, 1000)
        row |= {f"of {k}": float(np.mean(exact[count == k])) for k in (1, 2, 3)}
        rows.append(row)
    return rows
