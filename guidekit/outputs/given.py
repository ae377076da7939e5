"""The images that a run was given: copied into its folder, which restores the run by itself."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from guidekit.guidance import Guidance
from guidekit.options import names_paths, option_kinds
from guidekit.outputs.folders import slug
from guidekit.references import BUILT_IN, PICTURES

FOLDER = "given"


def within(value: Any, folder: str) -> Any:
    """An option's value with the copies in it named from where `folder`, the run's, is a name."""
    if isinstance(value, list):
        return [within(item, folder) for item in value]
    copied = isinstance(value, str) and value.startswith(f"{FOLDER}/")
    return f"{folder}/{value}" if copied else value


class GivenImages:
    """Images of the user's that settings name, by the names that they have in a run's folder.

    offered: files that runs name by their own paths and do not copy, as a server's are.
    """

    def __init__(self, offered: Iterable[Path] = ()) -> None:
        self._offered = set(offered)
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
        if BUILT_IN.fullmatch(path.name) and not path.exists():
            return path.name
        image = path.suffix.lower() in PICTURES and path.is_file()
        if not image or path.resolve() in self._offered:
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
