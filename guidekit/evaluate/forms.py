"""Folders as other benchmarks' scorers read them, so that those run unchanged."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guidekit.errors import GuidekitError
from guidekit.evaluate.images import ImageSet
from guidekit.system.untrusted import parse_json, read_text

LONGEST = 150  # characters of a prompt in a file's name


def by_prompt(images: ImageSet, prompts: Mapping[str, str]) -> dict[str, list[str]]:
    """Keys of the images of every prompt, both in the order of the keys."""
    found: dict[str, list[str]] = {}
    for key in images.keys:
        if key in prompts:
            found.setdefault(prompts[key], []).append(key)
    return found


def write_geneval(
    images: ImageSet, prompts: Mapping[str, str], metadata: Path, folder: Path
) -> int:
    """Writes 00000/metadata.jsonl and 00000/samples/0000.png for each line of GenEval's metadata.

    Returns how many images were written. Raises GuidekitError for a prompt without images.
    """
    rows = [parse_json(line) for line in read_text(metadata).splitlines() if line.strip()]
    groups, count = by_prompt(images, prompts), 0
    for number, row in enumerate(rows):
        place = folder / f"{number:05d}"
        (place / "samples").mkdir(parents=True, exist_ok=True)
        (place / "metadata.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
        for i, key in enumerate(_of(groups, row)):
            images.image(key).save(place / "samples" / f"{i:04d}.png")
            count += 1
    return count


def _of(groups: Mapping[str, Sequence[str]], row: Any) -> Sequence[str]:
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if prompt not in groups:
        raise GuidekitError(f"no image has the prompt {prompt!r} of the metadata; draw it first")
    return groups[prompt]


def write_t2i_compbench(images: ImageSet, prompts: Mapping[str, str], folder: Path) -> int:
    """Writes samples/PROMPT_000000.png, numbered through; returns how many."""
    place, count = folder / "samples", 0
    place.mkdir(parents=True, exist_ok=True)
    for prompt, keys in by_prompt(images, prompts).items():
        if "/" in prompt or "\0" in prompt or len(prompt) > LONGEST:
            raise GuidekitError(f"the prompt {prompt!r} cannot be a file's name, as it is there")
        for key in keys:
            images.image(key).save(place / f"{prompt}_{count:06d}.png")
            count += 1
    return count
