"""`benchmarks/cat.py --quick`: every row of the parts that draw, each kept and not drawn again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cat.py"
SEEING, TEXTS = ("segmentation", "features"), ("text, MiniLM", "text, worlds-clip")
VOTES = ("vote", "vote, worlds-clip", "vote, worlds-clip, ties to text")
ROWS = {*SEEING, *TEXTS, *VOTES, "random", "oracle", "real prints"}
SLOWER = "vote, a third of the rate"
TRAINED = {
    "fresh filters",
    "scratch",
    "scratch, longer",
    "scratch on 10000",
    SLOWER,
    "vote, longer",
}
OVER = {("vote", own) for own in ("segmentation, text where unseen", "scratch", SLOWER, TEXTS[0])}
OVER |= {(vote, own) for vote in VOTES for own in SEEING}
OVER |= {(vote, TEXTS[1]) for vote in VOTES[1:]} | {("vote, longer", "scratch, longer")}


def test_all_rows_run_and_are_kept(tmp_path):
    words = [sys.executable, SCRIPT, "--quick", "--out", tmp_path, "--json", tmp_path / "r.json"]
    first = subprocess.run(words, capture_output=True, text=True, check=True)
    found = json.loads((tmp_path / "r.json").read_text())
    names = {(row["part"], row["method"]) for row in found["rows"] if "method" in row}
    estimates = {"text, scenes-clip", "vote, ties to text", "vote, a class a pixel", *VOTES}
    assert names >= {("affinity", row) for row in estimates}
    assert names >= {("host", "source model"), *(("training-free", row) for row in ROWS)}
    assert names >= {("fine-tuned", row) for row in ROWS | TRAINED}
    over = {(row["row"], row["less"]) for row in found["rows"] if row["part"] == "paired"}
    assert over == OVER
    (further,) = [row for row in found["rows"] if row["part"] == "further"]
    assert (further["shots"], further["images"], further["nearer in"] in (0, 1)) == (25, 8, True)
    assert '25 shots: "vote" against scratch (once, so over layouts alone)' in first.stdout
    assert '25 shots, 8 images: "vote" against scratch (once' in first.stdout
    again = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "drawing" in first.stderr
    assert "drawing" not in again.stderr
    assert json.loads((tmp_path / "r.json").read_text()) == found
