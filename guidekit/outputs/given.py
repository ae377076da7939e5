"""The images that a run was given: copied into its folder, which restores the run by itself."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from guidekit.guidance import Guidance
from guidekit.options import names_paths, option_kinds
from guidekit.outputs.folders import slug
from guidekit.references import PICTURES

FOLDER = "given"


class GivenImages:
    """Images of the user's that settings name, by the names that they have in a run's folder."""

    def __init__(self) -> None:
        #: Where the copy of every name, such as given/photo.png, comes from.
        self.sources: dict[str, Path] = {}

    def renamed(self, tables: dict[str, Any], guidances: Iterable[Guidance]) -> dict[str, Any]:
        """The tables of run.json with the copies in place of the images that they name.

        Those are `image` of [sample] and the options of plugins that are paths.
        """
        sample = tables["sample"] | {"image": self._renamed(tables["sample"]["image"])}
        plugin = {}
        for guidance in guidances:
            kinds = option_kinds(type(guidance))
            plugin[guidance.name] = {
                option: self._renamed(value) if names_paths(kinds[option]) else value
                for option, value in tables["plugin"][guidance.name].items()
            }
        return tables | {"sample": sample, "plugin": plugin}

    def _renamed(self, value: Any) -> Any:
        """A path or a list of them; what is no file of an image stays as it is."""
        if isinstance(value, list):
            return [self._renamed(item) for item in value]
        path = Path(value or "")
        if path.suffix.lower() not in PICTURES or not path.is_file():
            return value
        own = (name for name, source in self.sources.items() if source == path)
        return next(own, None) or self._add(path)

    def _add(self, path: Path) -> str:
        base, number = slug(path.stem), 1
        name = f"{FOLDER}/{base}{path.suffix.lower()}"
        while name in self.sources:
            number += 1
            name = f"{FOLDER}/{base}-{number}{path.suffix.lower()}"
        self.sources[name] = path
        return name

    def save(self, folder: Path) -> None:
        """Copies every image into the run's folder, byte for byte."""
        for name, source in self.sources.items():
            (folder / FOLDER).mkdir(exist_ok=True)
            shutil.copyfile(source, folder / name)
