"""The kernels' own check and the tests that need a GPU, as rows of JSON.

python benchmarks/gpu_verdicts.py check
python benchmarks/gpu_verdicts.py tests
"""

import subprocess
import sys
import time
from pathlib import Path

import click
import torch

from guidekit_kernels import ptxas
from measured import Results

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "check": ["-m", "guidekit_kernels.check"],
    "tests": ["-m", "pytest", "-p", "no:cacheprovider", "-q", "-m", "gpu", "tests/kernels"],
}


def ran(arguments: list[str]) -> dict:
    """Exit code, seconds and the last lines of a command of this Python."""
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    print(run.stdout[-20000:], run.stderr[-5000:])
    last = (run.stdout.strip() or run.stderr.strip()).splitlines()[-15:]
    return {"exit": run.returncode, "seconds": round(seconds, 1), "last lines": last}


@click.command()
@click.argument("part", type=click.Choice(list(COMMANDS)))
@click.option("--json", "json_file", type=click.Path(), help="Also write the row here.")
def main(part, json_file):
    """Runs one of them; its failure is a result."""
    found = ptxas.version() if torch.cuda.is_available() else None
    results = Results(json_file, part=part, ptxas=found)
    results.add(ran(COMMANDS[part]))
    results.finish()


if __name__ == "__main__":
    main()
