"""`guidekit doctor`: versions, devices, attention implementations and built-in models."""

import json
import sys
from typing import Any

import click

from guidekit.cli.errors import traceback_option
from guidekit.cli.terminal import say


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@traceback_option
def doctor(as_json: bool) -> None:
    """Say what is installed and what works on this machine; exit code 1 if a model is damaged."""
    if not as_json:
        say("looking  at this machine; every built-in model is loaded")
    facts = doctor_facts()
    if as_json:
        click.echo(json.dumps(facts))
    else:
        say(doctor_text(facts))
    sys.exit(0 if facts["healthy"] else 1)


def doctor_facts() -> dict[str, Any]:
    """Versions, devices, attention implementations and built-in models."""
    import torch

    from guidekit.attention.choice import choose, measured_on
    from guidekit.outputs.folders import machine, versions
    from guidekit.registry import entries

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    models = _models()
    return {
        "versions": versions(),
        "machine": machine(),
        "devices": ["cpu", *(f"cuda:{i} {name}" for i, name in enumerate(devices))],
        "attention": _attention(),
        "chosen": choose(),
        "kernel times": measured_on() or "none of a GPU of this kind",
        "models": models,
        "plugins": [entry.name for entry in entries()],
        "healthy": all(state.startswith("intact") for state in models.values()),
    }


def _attention() -> dict[str, str]:
    """Every implementation: "works" after a call of it here, or why it does not."""
    from guidekit.attention.choice import implementations

    return {
        name: tried(name) if state == "available" else state
        for name, state in implementations().items()
    }


def tried(name: str) -> str:
    """`works` if one call of the implementation agrees with eager attention."""
    import torch

    from guidekit.attention.call import AttentionCall, attend

    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    draws = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 16, 32, generator=draws).to(device, dtype)
    weights = torch.eye(16, device=device)[None, :, :4]
    try:
        call = AttentionCall("", None, 0, query, key, value, implementation=name)
        wanted = attend(call, weights, "eager")  # output and maps
        given = (call.run(),) if name == "xformers" else attend(call, weights, name)
        gaps = [(a - b).abs().max().float() for a, b in zip(given, wanted, strict=False)]
        gap = float(torch.stack(gaps).max())  # of torch: Python's passes nan over
    except (ImportError, OSError, RuntimeError, NotImplementedError) as error:
        return f"fails: {(str(error) or type(error).__name__).splitlines()[0]}"
    return "works" if gap < 1e-2 else f"wrong: it differs from eager attention by {gap:.2g}"


def _models() -> dict[str, str]:
    """Every built-in model: "intact", "intact, loads" for a pipeline, or what is wrong."""
    from guidekit.backbones.loading import built_in, load
    from guidekit.cli.models import quiet_libraries
    from guidekit.zoo.shipped import damages

    quiet_libraries()
    states = {name: damage or "intact" for name, damage in damages().items()}
    for name in built_in():
        if states[name] == "intact":
            try:
                load(name, "cpu")
                states[name] = "intact, loads"
            except ValueError as error:
                states[name] = f"{error} (its files are as shipped)"
    return states


def doctor_text(facts: dict[str, Any]) -> str:
    """The facts of the machine for people."""
    lines = [f"{name:<14}{value}" for name, value in facts["versions"].items()]
    lines += [f"{name:<14}{value or 'none'}" for name, value in facts["machine"].items()]
    lines += [f"{'device':<14}{device}" for device in facts["devices"]]
    for name, state in facts["attention"].items():
        mark = ", chosen" if name == facts["chosen"] else ""
        lines.append(f"{'attention':<14}{name}: {state}{mark}")
    if facts["chosen"] == "auto":
        lines.append(f"{'attention':<14}sdpa or triton call by call, whichever was faster")
    lines.append(f"{'kernel times':<14}{facts['kernel times']}")
    models = [f"{'model':<14}{name}: {state}" for name, state in facts["models"].items()]
    lines += models or [f"{'model':<14}none built in; guidekit train scenes makes one"]
    lines.append(f"{'plugins':<14}{', '.join(facts['plugins'])}")
    return "\n".join(lines)
