"""What a user asks of a run: settings filled in, options of plugins, the condition."""

from dataclasses import replace
from typing import Any

from guidekit.cli.settings import Settings
from guidekit.conditions import Condition, Segment
from guidekit.errors import GuidekitError
from guidekit.layouts import load_layout, parse_layout, parse_segment
from guidekit.masks import box_mask
from guidekit.references import load_reference
from guidekit.registry import Registry
from guidekit.zoo.shipped import model_defaults

DEFAULTS = {"cfg": None, "steps": 50, "plugin": {}}
PROMPT = "a red circle and a blue square on a white background"
BOXES = {"red circle": (0.06, 0.06, 0.48, 0.48), "blue square": (0.52, 0.52, 0.94, 0.94)}


def with_defaults(settings: Settings) -> Settings:
    """The settings with the model's own values where the user gave none."""
    own = DEFAULTS | model_defaults(settings.model)
    plugin = {n: own["plugin"].get(n, {}) | options for n, options in settings.plugin.items()}
    return replace(
        settings,
        plugin=plugin,
        cfg=own["cfg"] if settings.cfg is None else settings.cfg,
        steps=own["steps"] if settings.steps is None else settings.steps,
    )


def ask(settings: Settings) -> Condition:
    """The condition of the settings: the layout, then the segments, in the given order."""
    layout = Condition() if settings.layout is None else load_layout(settings.layout)
    texts = [entry for entry in settings.segment if isinstance(entry, str)]
    tables = [entry for entry in settings.segment if not isinstance(entry, str)]
    parsed = parse_layout({"segments": tables}, settings.folder, "config").segments
    segments = (*layout.segments, *parsed, *map(parse_segment, texts))
    prompt = layout.prompt if settings.prompt is None else settings.prompt
    negative = layout.negative if settings.negative is None else settings.negative
    if settings.prompt is None and not prompt and segments and not settings.append_phrases:
        raise GuidekitError("there are segments but no prompt; give --prompt with their phrases")
    label = layout.label if settings.label is None else settings.label
    image = None if settings.image is None else load_reference(settings.image)
    return Condition(prompt, negative, segments, label, image)


def nothing_asked(settings: Settings, condition: Condition) -> bool:
    """Whether there is no prompt, not even an empty one, and nothing in its place."""
    return settings.prompt is None and condition == Condition(negative=condition.negative)


def example(negative: str = "") -> Condition:
    """What is drawn where the user asks for nothing."""
    segments = tuple(Segment(p, box_mask(box), box=box) for p, box in BOXES.items())
    return Condition(PROMPT, negative, segments)


def plugin_guidance(registry: Registry, settings: Settings, name: str) -> Any:
    """A guidance from the file's or the model's options, then those by --set."""
    changes = settings.changes.get(name, {})
    kept = {k: v for k, v in settings.plugin[name].items() if k not in changes}
    made = registry.make_guidance(name, kept, settings.folder)
    options = {k: getattr(made, k) for k in kept} | changes
    return registry.make_guidance(name, options)
