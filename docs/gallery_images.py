"""The images that an example saved, for the gallery."""

import shutil
from pathlib import Path

from sphinx_gallery.scrapers import figure_rst


def new_images(block, block_vars, gallery_conf) -> str:
    """Images that the last cell wrote into its working folder (moved away), as reStructuredText."""
    names = []
    for path in sorted(Path.cwd().glob("*.png")):
        target = next(block_vars["image_path_iterator"])
        shutil.move(path, target)
        names.append(target)
    return figure_rst(names, gallery_conf["src_dir"]) if names else ""
