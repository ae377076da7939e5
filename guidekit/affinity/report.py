"""What people see of an affinity: an image of the matrix, and lines of text."""

from collections import Counter

from PIL import Image, ImageDraw, ImageFont

from guidekit.affinity.matrix import Affinity
from guidekit.images import heat_map
from guidekit.labels import VOID

CELL, MARGIN = 11, 150  # pixels of a class, and for its name
NAMED = 200  # classes a side that still get their names


def matrix_image(affinity: Affinity) -> Image.Image:
    """The vote as marks over the mean of the estimates' shares; rows are source classes.

    Columns for which nothing speaks are black.
    """
    shares = affinity.said()
    rows, columns = shares.shape
    cells = heat_map(shares, 1.0, least=1).resize((columns * CELL, rows * CELL), 0)
    sheet = Image.new("RGB", (cells.width + MARGIN, cells.height + MARGIN), "white")
    sheet.paste(cells, (MARGIN, MARGIN))
    draw = ImageDraw.Draw(sheet)
    for column, vote in enumerate(affinity.votes()):
        if vote.to != VOID:
            x, y = MARGIN + column * CELL, MARGIN + vote.to * CELL
            draw.rectangle((x, y, x + CELL - 1, y + CELL - 1), outline="#33ddff")
    if max(rows, columns) <= NAMED:
        _write_names(sheet, affinity)
    return sheet


def _write_names(sheet: Image.Image, affinity: Affinity) -> None:
    """Source names at the left, target names on end above."""
    font = ImageFont.load_default(CELL - 2)
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(affinity.source.classes):
        place = (MARGIN - 4, MARGIN + row * CELL + CELL // 2)
        draw.text(place, name[:24], fill="black", font=font, anchor="rm")
    above = Image.new("RGB", (MARGIN, len(affinity.target) * CELL), "white")
    draw = ImageDraw.Draw(above)
    for column, name in enumerate(affinity.target.classes):
        place = (4, column * CELL + CELL // 2)
        draw.text(place, name[:24], fill="black", font=font, anchor="lm")
    sheet.paste(above.transpose(Image.Transpose.ROTATE_90), (MARGIN, 0))


def summary(affinity: Affinity) -> list[str]:
    """How the columns were decided, and what stands for each class, a line each."""
    votes = affinity.votes()
    counts = Counter(vote.how for vote in votes)
    lines = ["votes    " + ", ".join(f"{how} {count}" for how, count in counts.most_common())]
    names = affinity.source.classes
    for name, vote in zip(affinity.target.classes, votes, strict=True):
        said = ", ".join(f"{by} {names[s]}" for by, s in vote.named.items())
        to = "nothing" if vote.to == VOID else names[vote.to]
        lines.append(f"class    {name} <- {to} ({vote.how}{': ' if said else ''}{said})")
    return lines
