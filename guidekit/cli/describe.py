"""What `guidekit plugins show` and `guidekit doctor` say."""

import dataclasses
import inspect
import io
import shlex
import tokenize
from typing import Any

from guidekit.options import describe, option_kinds
from guidekit.registry import Registry, entries


def describe_plugin(name: str) -> dict[str, Any]:
    """What an entry offers, or one guidance of it, with every option."""
    namespace = name.partition(".")[0]
    registry = Registry()
    offers = registry.load(namespace)
    entry = next(entry for entry in entries() if entry.name == namespace)
    names = list(offers.guidances) if name == namespace else [name]
    return {
        **dataclasses.asdict(entry),
        "guidances": [describe_guidance(n, registry.guidance_class(n)) for n in names],
        "backbones": [f"{namespace}:{backbone}" for backbone in offers.backbones],
        "commands": _invocations(namespace, [command.name for command in offers.commands]),
    }


def _invocations(namespace: str, names: list[str]) -> list[str]:
    """How a plugin's commands are called: the only one by the plugin's name, several in a group."""
    return [namespace] if len(names) == 1 else [f"{namespace} {name}" for name in names]


def describe_guidance(name: str, cls: type) -> dict[str, Any]:
    """A guidance's texts and options."""
    comments, kinds = field_comments(cls), option_kinds(cls)
    module = inspect.getdoc(inspect.getmodule(cls)) or ""
    options = [
        {
            "option": field.name,
            "type": describe(kinds[field.name]),
            "default": _default(field),
            "comment": comments.get(field.name, ""),
        }
        for field in dataclasses.fields(cls)
        if field.init
    ]
    return {
        "name": name,
        "about": inspect.getdoc(cls) or "",
        "paper": module,
        "options": options,
        "example": _example(name, cls),
    }


def _example(name: str, cls: type) -> str:
    """A command that works: what the class's own example sets, else its first option."""
    example = cls.example()
    fields = [f for f in dataclasses.fields(cls) if f.init]
    values = {f.name: getattr(example, f.name) for f in fields}
    own = {f.name: values[f.name] for f in fields if values[f.name] != _raw_default(f)}
    settings = own or {fields[0].name: values[fields[0].name]}
    words = [f"--set {shlex.quote(f'{name}.{k}={_text(v)}')}" for k, v in settings.items()]
    words += ["--image scene-3"] * cls.reads_image
    return " ".join([f"guidekit sample --plugin {name}", *words])


def _text(value: Any) -> str:
    """A value as `--set` takes it."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _default(field: dataclasses.Field) -> Any:
    """A field's default as JSON has it; None where there is none."""
    value = _raw_default(field)
    if value is dataclasses.MISSING:
        return None
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _raw_default(field: dataclasses.Field) -> Any:
    made = field.default_factory is not dataclasses.MISSING
    return field.default_factory() if made else field.default


def field_comments(cls: type) -> dict[str, str]:
    """The comment behind every field in the source of a dataclass and its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        fields = base.__dict__.get("__annotations__", {})
        if not fields:
            continue
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):  # a class made at run time has no source
            continue
        found |= {n: c for n, c in _line_comments(source).items() if n in fields}
    return found


def _line_comments(source: str) -> dict[str, str]:
    """First word of a line to the comments above it and at its end."""
    comments: dict[str, str] = {}
    above: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(inspect.cleandoc(source)).readline):
        if token.type == tokenize.COMMENT and token.line.strip().startswith("#"):
            above.append(token.string.lstrip("#: ").strip())
        elif token.type == tokenize.NAME and ":" in token.line and token.start[1] == _indent(token):
            name, _, rest = token.line.strip().partition(":")
            own = rest.partition("  #")[2].lstrip("#: ").strip()
            if text := " ".join(filter(None, [*above, own])):
                comments.setdefault(name, text)
            above = []
    return comments


def _indent(token: tokenize.TokenInfo) -> int:
    return len(token.line) - len(token.line.lstrip())


def plugin_text(facts: dict[str, Any]) -> str:
    """The facts of a plugin for people."""
    origin = "first-party" if facts["first_party"] else "third-party"
    lines = [f"{facts['name']} {facts['version']}, {origin}, {facts['distribution']}"]
    lines[0] += f" ({facts['module']})"
    for guidance in facts["guidances"]:
        lines += ["", f"plugin {guidance['name']}: {guidance['about']}", "", guidance["paper"], ""]
        rows = [(o["option"], o["type"], repr(o["default"])) for o in guidance["options"]]
        widths = [max(len(row[i]) for row in rows) for i in range(3)] if rows else []
        for row, option in zip(rows, guidance["options"], strict=True):
            cells = "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True))
            lines.append(f"  {cells}  {option['comment']}".rstrip())
        lines += ["", f"example: {guidance['example']}"]
    lines += [f"\nbackbone: guidekit sample --model {name}" for name in facts["backbones"]]
    lines += [f"\ncommand: guidekit {name} --help" for name in facts["commands"]]
    return "\n".join(lines)


def doctor_facts() -> dict[str, Any]:
    """Versions, devices, attention implementations and built-in models."""
    import torch

    from guidekit.attention.choice import choose, measured_on
    from guidekit.cli.outputs import machine, versions

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    models = _models()
    return {
        "versions": versions(),
        "machine": machine(),
        "devices": ["cpu", *(f"cuda:{i} {name}" for i, name in enumerate(devices))],
        "attention": _attention(),
        "chosen": choose(),
        "kernel times": measured_on() or "a model: not measured on a GPU of this kind",
        "models": models,
        "plugins": [entry.name for entry in entries()],
        "healthy": all(state.startswith("intact") for state in models.values()),
    }


def _attention() -> dict[str, str]:
    """Every implementation: "works" after a call of it here, or why it does not."""
    from guidekit.attention.choice import implementations

    return {
        name: _tried(name) if state == "available" else state
        for name, state in implementations().items()
    }


def _tried(name: str) -> str:
    """ "works" if one call of the implementation agrees with eager attention."""
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
    from guidekit.cli.session import quiet_libraries
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
    lines += [f"{name:<14}{value}" for name, value in facts["machine"].items()]
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
