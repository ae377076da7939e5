"""The attention kernels: interpreter and compiler in processes of their own, errors, tile table."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from guidekit_kernels import tiles
from guidekit_kernels.attention_map import attend

HERE = Path(__file__).parent
SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448}  # of one program, in bytes
OLDEST, NEWEST = "3.6.0", "3.9.0"  # triton that is supported


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
        assert row["spilled"] == 0, row
        assert row["vector"] > 0, row


# SD 1.5's and SDXL's cross-attention; the bias of Paint-with-Words.
CASES = [
    *(dict(d=d, t=77, dtype="bfloat16", mask="rows") for d in (40, 64, 128, 160)),
    dict(d=64, t=77, dtype="bfloat16"),
    dict(d=80, t=77, dtype="float16", mask="rows"),
    dict(d=160, t=77, dtype="float16", mask="keys"),
]


@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_compiled(arch):
    """No spills, memory within the limit, vector loads: SDXL's, plain and painted."""
    rows = compiled(arch, CASES[1], CASES[4])
    assert len(rows) == 4
    fits(rows)


@pytest.fixture(scope="session", params=[OLDEST, NEWEST])
def other_triton(request, tmp_path_factory):
    """A version of triton and a folder with it: GUIDEKIT_TRITON/version, else from the index."""
    if folder := os.environ.get("GUIDEKIT_TRITON"):
        return request.param, f"{folder}/{request.param}"
    folder = str(tmp_path_factory.mktemp("triton"))
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder]
    subprocess.run([*install, f"triton=={request.param}"], check=True)
    return request.param, folder


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_compiled_by_the_oldest_and_the_newest_triton(arch, other_triton):
    version, folder = other_triton
    rows = compiled(arch, *CASES, other=folder)
    assert len(rows) == 2 * len(CASES)
    assert {row["triton"] for row in rows} == {version}
    fits(rows)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_compiled_table(arch):
    fits(compiled(arch, *CASES))


@pytest.mark.parametrize("shared, most", [(101376, 128), (166912, 160), (232448, 160)])
def test_head_size_by_shared_memory(shared, most, monkeypatch):
    about = SimpleNamespace(shared_memory_per_block_optin=shared)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    assert tiles.max_head(torch.device("cuda")) == most


def test_table_is_complete():
    for arch in (80, 90):
        for kernel in ("forward", "query"):
            for d in range(8, tiles.MAX_HEAD + 1, 8):
                assert tiles.tile(kernel, d, arch).rows >= 16, (arch, kernel, d)


def inputs(**changes):
    q, k, v = torch.zeros(2, 4, 8, 16), torch.zeros(2, 4, 6, 16), torch.zeros(2, 4, 6, 16)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    return dict(query=q, key=k, value=v, weights=torch.zeros(1, 6, 3)) | changes


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(query=torch.zeros(2, 4, 8, 16).double()), "in fp16 or bf16, all in one, not torch.f"),
        (dict(key=torch.zeros(2, 2, 6, 16).bfloat16()), r"key and value \(B, H, T, d\), not"),
        (dict(weights=torch.zeros(6, 3)), r"weights \(1 or 2, 6, S\), not \(6, 3\)"),
        (dict(weights=torch.zeros(3, 6, 3)), r"weights \(1 or 2"),
        (dict(weights=torch.zeros(1, 6, 0)), "1 to 32 maps, not 0"),
        (dict(weights=torch.zeros(1, 6, 3).requires_grad_()), "frozen .* one that requires grad"),
        (dict(mask=torch.zeros(2, 1, 1, 6).requires_grad_()), "frozen .* one that requires grad"),
        (dict(value=torch.zeros(2, 4, 6, 16).bfloat16().requires_grad_()), "frozen keys"),
    ],
)
def test_errors_name_the_remedy(changes, message):
    with pytest.raises(ValueError, match=f"{message}.*; 'sdpa' takes others"):
        attend(**inputs(**changes))


@pytest.mark.parametrize("t, d", [(129, 64), (77, 168), (77, 20)])
def test_long_keys_and_large_heads_are_for_others(t, d):
    q, k = torch.zeros(1, 1, 4, d).half(), torch.zeros(1, 1, t, d).half()
    with pytest.raises(ValueError, match=f"not {t} keys and {d} numbers; 'sdpa' takes others"):
        attend(q, k, k, torch.zeros(1, t, 1))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter has no need")
def test_a_cpu_tensor_needs_the_interpreter():
    with pytest.raises(RuntimeError, match="CUDA device, or TRITON_INTERPRET=1.*'sdpa' runs any"):
        attend(**inputs())
