"""All methods of training-free guidance where truth or a judge is known: what they reach and cost.

    python benchmarks/family.py --part layouts --json benchmarks/results/family-layouts.json
    python benchmarks/family.py --part energies --json benchmarks/results/family-energies.json
    python benchmarks/family.py --part inverse --json benchmarks/results/family-inverse.json
    python benchmarks/family.py --part inverse --model digits-ddpm --method pigdm
    python benchmarks/family.py --part layouts --quick

Every row is drawn in a process of its own with one thread and written when it is there; the same
command goes on where it was stopped. Costs are the process's time on the CPU, of an image in a
batch, and the growth of its resident set over the batch. Intervals are 95%, by a bootstrap over
images or layouts. Judges never guided; what they read is in the part's own file.
"""

import click
import torch

import family_energies
import family_inverse
import family_layouts
from measured import Results, apart

PARTS = {"inverse": family_inverse, "energies": family_energies, "layouts": family_layouts}
STEPS = {"inverse": 50, "energies": 15, "layouts": 20}


@click.command()
@click.option("--part", type=click.Choice(list(PARTS)), default="inverse", show_default=True)
@click.option("--quick", is_flag=True, help="4 images, 5 steps.")
@click.option("--n", default=200, show_default=True, help="Images a row.")
@click.option("--steps", default=0, help="50 for inverse, 20 for layouts, 15 for energies.")
@click.option("--batch", default=20, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the first image.")
@click.option("--model", "models", multiple=True, help="Rows of these models alone.")
@click.option("--task", "tasks", multiple=True, help="Rows of these tasks alone.")
@click.option("--method", "methods", multiple=True, help="Rows of these methods alone.")
@click.option("--json", "path", type=click.Path(dir_okay=False), help="Write the rows there.")
def main(part, quick, n, steps, batch, seed, models, tasks, methods, path) -> None:
    """Print a row for each method on each problem."""
    torch.set_num_threads(1)
    n, steps = (4, steps or 5) if quick else (n, steps or STEPS[part])
    module, chosen = PARTS[part], {"model": models, "task": tasks, "method": methods}
    seeds = [seed, seed + n - 1]
    results = Results(path, resume=True, part=part, n=n, seeds=seeds, steps=steps, batch=batch)
    for key in module.row_keys():
        wanted = all(key[name] in values for name, values in chosen.items() if values)
        if wanted and not results.has(**key):
            results.add(apart(module.row, key, n, steps, batch, seed))
    if all(results.has(**key) for key in module.row_keys()):
        results.finish()


if __name__ == "__main__":
    main()
