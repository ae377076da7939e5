"""The page of models x schedulers x plugins, made of benchmarks/results/conformance.json."""

import re

import tables

HEAD = """# Models, schedulers, plugins

`python benchmarks/conformance.py` lets every plugin guide a tiny random model of every family under
every scheduler that the family can have, with `--quick` under two of them, in four steps with the
options of the plugin's own example. A plugin *acts* where the account says so and the finite images
differ from the unguided ones; else it refuses in one line that says why.
"""


def page() -> str:
    """All of it, or how to measure it."""
    found = tables.result("conformance")
    if not found.rows:
        return f"{HEAD}\n*Not measured with this version:* {found.again}.\n"
    rows = found.rows
    parts = [
        HEAD.rstrip(),
        tables.caption(found),
        "## Plugins and models\n\nUnder how many of the schedulers that were tried a plugin acts.",
        by_family(rows),
        "## Schedulers\n\nHow many of the plugins act on the family under the scheduler.",
        by_scheduler(rows),
        "## Why not\n\nWhat a plugin says where it refuses, and for which schedulers.",
        *reasons(rows),
    ]
    return "\n\n".join(parts)


def names(rows: list[dict], key: str) -> list[str]:
    """The values of a key, each once, in their order."""
    return list(dict.fromkeys(row[key] for row in rows))


def counted(rows: list[dict]) -> str:
    """Of how many cells how many act."""
    acts = sum(row["state"] == "ok" for row in rows)
    if not rows:
        return ""
    return "all" if acts == len(rows) else f"{acts} of {len(rows)}" if acts else "no"


def grid(rows: list[dict], down: str, across: str, corner: str) -> str:
    """A table of the cells of two keys."""
    columns = names(rows, across)
    lines = [[corner, *columns], ["---"] * (len(columns) + 1)]
    for name in names(rows, down):
        own = [row for row in rows if row[down] == name]
        cells = [counted([row for row in own if row[across] == column]) for column in columns]
        lines.append([f"`{name}`", *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_family(rows: list[dict]) -> str:
    """Plugins down, families across."""
    return grid(rows, "plugin", "family", "plugin")


def by_scheduler(rows: list[dict]) -> str:
    """Schedulers down, families across."""
    return grid(rows, "scheduler", "family", "scheduler")


def reasons(rows: list[dict]) -> list[str]:
    """For every plugin the reasons, and where each holds."""
    told = []
    for plugin in names(rows, "plugin"):
        own = [row for row in rows if row["plugin"] == plugin and row["state"] != "ok"]
        where: dict[str, dict[str, list[str]]] = {}
        for row in own:
            families = where.setdefault(general(row["reason"]), {})
            families.setdefault(row["family"], []).append(row["scheduler"])
        lines = [f"- {reason} ({places(found, rows)})" for reason, found in where.items()]
        told += [f"**`{plugin}`**\n\n" + "\n".join(lines)] if lines else []
    return told


def general(reason: str) -> str:
    """A reason without the class of the scheduler, which stands beside it."""
    return re.sub(r"\b\w*(?:Scheduler|Multistep)\b", "this scheduler", reason).replace("*", r"\*")


def places(found: dict[str, list[str]], rows: list[dict]) -> str:
    """Families, with their schedulers where not all are meant."""
    words = []
    for family, schedulers in found.items():
        whole = len(schedulers) == len({r["scheduler"] for r in rows if r["family"] == family})
        words.append(family if whole else f"{family}: {', '.join(schedulers)}")
    return "; ".join(words)
