"""Numbers of the pages: read from benchmarks/results, which says what they were measured on."""

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
PAGES = [*sorted((ROOT / "docs/results").glob("*.md")), ROOT / "benchmarks" / "README.md"]


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("docs_tables", ROOT / "docs" / "tables.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def made(tables, tmp_path, monkeypatch):
    """Writes a file of results in the place of `layout`'s."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)

    def write(**facts):
        whole = {"rows": [], "command": "python x.py", "cores": 2, "machine": "m", "torch": "2"}
        whole |= {"threads": 1, "date": "2026-01-01", "finished": True, "said": []} | facts
        (tmp_path / "layout.json").write_text(json.dumps(whole))

    tables.result.cache_clear()
    yield write
    tables.result.cache_clear()


def outside(tables, text):
    """A page without its made tables, numbers with an address, code, and names of papers."""
    for made in (tables.TABLE, tables.INDEX, tables.NUMBER):
        text = made.sub("", text)
    return re.sub(r"```.*?```|`[^`]*`|arXiv:[\d.]+", "", text, flags=re.DOTALL)


def test_every_table_of_numbers_is_made_of_results(tables):
    for page in PAGES:
        left = outside(tables, page.read_text())
        assert not re.findall(r"^\|.*\d.*\|$", left, re.MULTILINE), page


def test_every_number_in_a_sentence_is_read_from_results(tables):
    for page in PAGES:
        left = outside(tables, page.read_text())
        assert not re.findall(r"[^\n]*(?:\d\.\d|\d ?%)[^\n]*", left), page


def test_all_pages_are_fresh(tables):
    for page in tables.PAGES:
        text = page.read_text()
        assert tables.filled(text) == text, f"{page}: run python docs/generate.py"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_of_results_says_what_it_was_measured_on(path, tables):
    facts = json.loads(path.read_text())
    assert path.stem in tables.commands()
    assert facts["rows"]
    assert facts["command"].startswith("python benchmarks/")
    assert {"threads", "cores", "machine", "device", "torch", "date", "finished"} <= set(facts)
    assert not re.search(r'"/(?:root|home|tmp)', json.dumps(facts))


def test_every_command_has_a_script_with_its_flags(tables):
    for name, entry in tables.commands().items():
        script, *words = shlex.split(entry["run"])
        source = (ROOT / "benchmarks" / script).read_text()
        for flag in ["--json", *(word for word in words if word.startswith("--"))]:
            assert f'"{flag}"' in source, f"{name}: {script} has no {flag}"


def test_what_was_not_measured_says_so_with_its_command(tables, made):
    assert tables.filled("<!-- table: layout -->\n<!-- end of table -->") == (
        "<!-- table: layout -->\n\n*Not measured with this version:* "
        "`python benchmarks/layout.py --n 100 --json benchmarks/results/layout.json`.\n\n"
        "<!-- end of table -->"
    )


def test_a_table_has_the_rows_their_intervals_and_the_facts(tables, made):
    rows = [
        {"part": "a", "method": "x", "n": 4, "mIoU": 0.12345, "mIoU 95%": [0.1, 0.15]},
        {"part": "b", "method": "y", "n": 4, "mIoU": 0.5},
    ]
    made(rows=rows, n=4, seeds=[0, 3], steps=50, said=["x is less"])
    shown = tables.table_text(tables.Shown.read("layout part=a"))
    assert shown == (
        "| method | mIoU |\n| --- | --- |\n| x | 0.123 [0.10, 0.15] |\n\n"
        "Measured: n = 4, seeds 0 to 3, 50 steps; 1 thread of 2 m cores, torch 2, 2026-01-01: "
        "`python x.py`.\n\n- x is less"
    )
    with pytest.raises(SystemExit, match="no row with"):
        tables.table_text(tables.Shown.read("layout part=c"))


def test_rows_that_lack_a_column_stand_with_those_that_have_it(tables, made):
    made(rows=[{"method": "x", "a": 1}, {"method": "y", "a": 2, "b": 3}, {"kind": "z"}])
    shown = tables.table_text(tables.Shown.read("layout caption=none"))
    assert shown == (
        "| method | a | b |\n| --- | --- | --- |\n| x | 1 |  |\n| y | 2 | 3 |\n\n"
        "| kind |\n| --- |\n| z |"
    )


@pytest.mark.parametrize(
    "facts, begin",
    [({"origin": "typed"}, "*Of an earlier version, typed:*"), ({"finished": False}, "*Cut short")],
)
def test_what_is_old_or_cut_short_says_so(facts, begin, tables, made):
    made(rows=[{"method": "x"}], **facts)
    assert begin in tables.table_text(tables.Shown.read("layout"))


def test_a_number_in_a_sentence_is_read_by_row_and_column(tables, made):
    made(rows=[{"method": "Zest", "mIoU": 0.3719}, {"method": "x", "mIoU": 1.0}])
    assert tables.filled("it is 9<!-- = layout Zest mIoU 2 -->.") == (
        "it is 0.37<!-- = layout Zest mIoU 2 -->."
    )
    with pytest.raises(SystemExit, match="0 rows of layout say"):
        tables.filled("9<!-- = layout y mIoU -->")


NUMBERS = {0.0: "0.000", 1.1e-7: "1.1e-07", 12.34: "12.3", 1234.5: "1,234", 12000: "12,000"}
NUMBERS |= {7: "7", None: "", float("nan"): "", True: "True", "a": "a"}


@pytest.mark.parametrize("value, text", NUMBERS.items())
def test_numbers_have_the_digits_that_are_read(value, text, tables):
    assert tables.number(value) == text


def test_the_matrix_counts_cells_and_says_where_a_plugin_refuses(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "docs")
    matrix, tables = (importlib.import_module(name) for name in ("matrix", "tables"))
    cells = [("A", "ddim", "zest", ""), ("A", "unipc", "zest", "UniPCScheduler does not")]
    cells += [("B", "unipc", "zest", "needs a prompt"), ("A", "ddim", "pag", "")]
    names = "family", "scheduler", "plugin", "reason"
    rows = [dict(zip(names, c, strict=True), state="refused" if c[3] else "ok") for c in cells]
    assert matrix.by_family(rows).splitlines()[2:] == [
        "| `zest` | 1 of 2 | no |",
        "| `pag` | all |  |",
    ]
    assert matrix.by_scheduler(rows).splitlines()[-1] == "| `unipc` | no | no |"
    assert matrix.reasons(rows) == [
        "**`zest`**\n\n- this scheduler does not (A: unipc)\n- needs a prompt (B)"
    ]
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    tables.result.cache_clear()
    assert "Not measured with this version" in matrix.page()
