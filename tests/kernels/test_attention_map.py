"""The attention kernels: interpreter and compiler in processes of their own, errors, tile table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from guidekit_kernels import tiles
from guidekit_kernels.attention_map import attend

HERE = Path(__file__).parent
SIZES = (32, 40, 64, 72, 80, 96, 128, 160)
SHARED_MEMORY = {80: 166912, 86: 101376, 90: 232448}  # of one program, in bytes


# Half a minute on an idle core; a busy machine may take many times that.
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("file", ["interpreted_attention_map.py", "interpreted_models.py"])
def test_in_the_interpreter(file):
    pytest.importorskip("triton")
    options = ["-q", "-x", "-p", "no:cacheprovider", "--timeout=0", "-m", "full"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(HERE / file)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


def compiled(arch: int, *cases: dict, other: str | None = None) -> list[dict]:
    """What `compiled.py` prints; `other` is a folder with another triton to use."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if other is not None:
        environment["PYTHONPATH"] = other
    command = [sys.executable, "-W", "ignore", str(HERE / "compiled.py"), str(arch)]
    run = subprocess.run(
        command + [json.dumps(case) for case in cases],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def fits(rows: list[dict]) -> None:
    for row in rows:
        assert row["shared"] <= SHARED_MEMORY[row["arch"]], row
        assert row["spilled"] == 0 and row["vector"] > 0, row


# SDXL's and PixArt's cross-attention, Flux's joint attention.
TYPICAL = (
    dict(d=64, t=77, dtype="bfloat16", keys=False),
    dict(d=72, t=300, dtype="float16", mask="keys", keys=False),
    dict(d=128, t=4608, n=4608, dtype="bfloat16"),
)


@pytest.mark.parametrize("arch", [80, 90])
def test_compiled(arch):
    """No spills, memory within the limit, vector loads; Paint-with-Words and fp32 at SDXL's too."""
    painted = dict(d=64, t=77, dtype="bfloat16", bias=True, keys=False)
    rows = compiled(arch, *TYPICAL, painted, dict(d=64, t=77, dtype="float32"))
    assert len(rows) == 12
    fits(rows)


@pytest.fixture(scope="session")
def triton_36(tmp_path_factory):
    """A folder with triton 3.6: GUIDEKIT_TRITON, else installed from the package index."""
    if folder := os.environ.get("GUIDEKIT_TRITON"):
        return folder
    folder = str(tmp_path_factory.mktemp("triton"))
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder]
    subprocess.run([*install, "triton==3.6.0"], check=True)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("arch", [80, 90])
def test_compiled_by_triton_36(arch, triton_36):
    rows = compiled(arch, *TYPICAL, other=triton_36)
    assert len(rows) == 7 and {row["triton"] for row in rows} == {"3.6.0"}
    fits(rows)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_compiled_table(arch, d, dtype):
    """Every entry of the table, few keys and many, with the masks and the bias."""
    cases = [dict(d=d, t=t, dtype=dtype, mask="keys") for t in (77, 4096)]
    if dtype == "bfloat16":
        cases += [
            dict(d=d, t=77, dtype=dtype, mask="rows"),
            dict(d=d, t=77, dtype=dtype, bias=True),
        ]
    fits(compiled(arch, *cases))


def test_table_is_complete():
    for arch in (80, 90):
        for kernel in ("forward", "query", "key"):
            for d in (1, *SIZES, tiles.MAX_HEAD):
                for t, itemsize in ((1, 2), (77, 2), (77, 4), (8192, 2), (8192, 4)):
                    tile = tiles.tile(kernel, d, t, itemsize, arch)
                    assert tile.keys >= 16 and tile.rows >= 16, (arch, kernel, d, t)
                    assert t > 16 or tile.keys == 16


def test_saves_nothing_where_one_block_holds_the_keys():
    assert tiles.one_block(64, 77, 2, 90) and tiles.one_block(40, 77, 2, 80)
    assert not tiles.one_block(64, 129, 2, 90)


def test_programs_fill_the_processors():
    assert tiles.heads_per_program(1, 8, 4096, 128, 132) == 1
    assert tiles.heads_per_program(2, 8, 16384, 128, 132) == 4
    assert tiles.heads_per_program(1, 5, 100, 128, 1) == 1
    assert tiles.parts(programs=8, n=4096, rows=64, processors=132) == 16
    assert tiles.parts(programs=8, n=100, rows=64, processors=132) == 1


def inputs(**changes):
    q, k, v = torch.zeros(2, 4, 8, 16), torch.zeros(2, 2, 6, 16), torch.zeros(2, 2, 6, 16)
    return dict(query=q, key=k, value=v, weights=torch.zeros(1, 6, 3)) | changes


BIAS = torch.zeros(2, 5, 8), torch.zeros(1, 6, 5)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(reduce="sum"), "reduce is 'mean' or 'none', not 'sum'"),
        (dict(query=torch.zeros(2, 4, 8, 16).double()), "share one of fp32, fp16, bf16"),
        (dict(key=torch.zeros(2, 3, 6, 16)), "Hk dividing H"),
        (dict(value=torch.zeros(2, 2, 6, 8)), "'sdpa' takes others"),
        (dict(weights=torch.zeros(6, 3)), r"weights must be \(1 or 2, 6, 3\), not \(6, 3\)"),
        (dict(weights=torch.zeros(3, 6, 3)), r"weights must be \(1 or 2"),
        (dict(weights=torch.zeros(1, 6, 0)), "without maps call SDPA"),
        (dict(weights=torch.zeros(1, 6, 3).requires_grad_()), "no gradient .*weights.*detach"),
        (dict(mask=torch.zeros(2, 1, 1, 6).requires_grad_()), "no gradient .*mask.*detach"),
        (dict(mask=torch.zeros(2, 1, 7, 6)), "does not broadcast"),
        (dict(bias=(BIAS[0], BIAS[0])), r"words of bias must be \(1 or 2, 6, 5\)"),
        (dict(bias=(BIAS[0][..., 1:], BIAS[1])), r"segments of bias must be \(1 or 2, 5, 8\)"),
        (dict(bias=(torch.zeros(1, 33, 8), torch.zeros(1, 6, 33))), "at most 32, or pass it as"),
        (dict(rows=slice(0, 8, 2)), "rows is a slice of step 1, not 2"),
    ],
)
def test_errors_name_the_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        attend(**inputs(**changes))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter has no need")
def test_a_cpu_tensor_needs_the_interpreter():
    with pytest.raises(RuntimeError, match="CUDA device, or TRITON_INTERPRET=1.*'sdpa' runs any"):
        attend(**inputs())
