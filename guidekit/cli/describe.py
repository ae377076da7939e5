"""What `guidekit plugins show` says."""

import dataclasses
import inspect
import io
import shlex
import tokenize
from typing import Any

from guidekit.options import describe, option_kinds
from guidekit.registry import Registry, entries
from guidekit.zoo.shipped import tuned_for


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


def _tuned(entry: tuple[str, dict[str, Any]]) -> str:
    """What a model has in the place of the plugin's own defaults."""
    model, options = entry
    values = ", ".join(f"{name} {_text(value)}" for name, value in options.items())
    return f"tuned for --model {model}: {values} where you give no other"


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
        "tuned": tuned_for(name),
        "example": _example(name, cls),
    }


def _example(name: str, cls: type) -> str:
    """A command that works: the class's `usage`, or what its example sets, or its first option."""
    if cls.usage:
        return f"guidekit sample --plugin {name} {cls.usage}"
    example = cls.example()
    fields = [f for f in dataclasses.fields(cls) if f.init]
    values = {f.name: getattr(example, f.name) for f in fields}
    own = {f.name: values[f.name] for f in fields if values[f.name] != _raw_default(f)}
    settings = own or {fields[0].name: values[fields[0].name]}
    words = [f"--set {shlex.quote(f'{name}.{k}={_text(v)}')}" for k, v in settings.items()]
    words += ["--image scene-3"] * cls.reads_image
    if any("scene-3" in word for word in words):  # an image of that model's world
        words.insert(0, "--model scenes")
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
        fields = inspect.get_annotations(base)
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
        lines += ["", *map(_tuned, guidance["tuned"].items())]
        lines += [f"example: {guidance['example']}"]
    lines += [f"\nbackbone: guidekit sample --model {name}" for name in facts["backbones"]]
    lines += [f"\ncommand: guidekit {name} --help" for name in facts["commands"]]
    return "\n".join(lines)
