"""Results of a benchmark go on where they were stopped, if they are about the same."""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from measured import Results


def test_rows_are_kept_for_the_same_question_alone(tmp_path, capsys):
    path = tmp_path / "rows.json"
    first = Results(path, resume=True, n=4, steps=5)
    first.add({"method": "a", "value": 1.0})
    again = Results(path, resume=True, n=4, steps=5)
    assert again.has(method="a")
    assert not again.has(method="b")
    again.add({"method": "b", "value": 2.0})
    again.finish()
    facts = json.loads(path.read_text())
    assert facts["n"] == 4
    assert facts["finished"]
    assert facts["cores"]
    assert [row["method"] for row in json.loads(path.read_text())["rows"]] == ["a", "b"]
    assert not Results(path, resume=True, n=5, steps=5).rows
    assert not Results(path, n=5, steps=5).rows
