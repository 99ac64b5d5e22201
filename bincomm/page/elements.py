"""Elements of a page: sections, tables, figures and pictures, as HTML that needs no other file.

Figures are SVG files inside the page, narrow enough for a phone.
"""

import base64
import html
import io
from collections.abc import Callable, Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from bincomm.page.style import STYLE

LONGEST_NAME = 60
QUALITY = 85  # of pictures, as JPEG
DPI = 220  # of what is rasterized in figures: sharp on a phone
# Nothing is fetched and nothing runs, even if a name of a file should find a way around `escape`.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def document(title: str, body: str) -> str:
    """A page: its title and its parts are HTML."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n'
        f"<h1>{title}</h1>\n{body}</main>\n</body>\n</html>\n"
    )


def section(title: str, text: str, body: str) -> str:
    """A section; its parts are HTML."""
    return f"<section>\n<h2>{title}</h2>\n{text}\n{body}\n</section>\n"


def details(title: str, body: str) -> str:
    """What is folded until the title is clicked; both are HTML."""
    return f"<details><summary>{title}</summary>{body}</details>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text."""
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f'<div class="scroll tall"><table>{"".join(lines)}</table></div>'


def plot(draw: Callable[[Axes], None], alt: str, height: float = 2.7) -> str:
    """A figure of so many inches in height; `alt` says in text what it shows."""
    figure = Figure(figsize=(4.6, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": ""}):  # else equal figures have different names in them
        figure.savefig(file, format="svg", dpi=DPI, metadata={"Date": None})
    return f"<figure>{_image_tag(file, 'svg+xml', alt)}</figure>"


def add_legend(axes: Axes) -> None:
    """Put the legend above the plot, where it hides nothing."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8.5, frameon=False, handlelength=1.5
    )


def label_bit_counts(axes: Axes) -> None:
    """The vertical axis counts bits."""
    axes.set_ylabel("bits")
    use_integer_ticks(axes.yaxis)


def use_integer_ticks(axis: Axis) -> None:
    """The axis counts, so its ticks are integers."""
    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def picture_tag(picture: Image.Image, alt: str) -> str:
    """A picture, and what it shows in text."""
    file = io.BytesIO()
    picture.save(file, format="jpeg", quality=QUALITY)
    return _image_tag(file, "jpeg", alt)


def _image_tag(file: io.BytesIO, kind: str, alt: str) -> str:
    data, alt = base64.b64encode(file.getvalue()).decode(), escape(alt)
    return f'<img src="data:image/{kind};base64,{data}" alt="{alt}" title="{alt}">'


def join_numbers(values: Sequence[int]) -> str:
    """Numbers with commas between them, at most 30."""
    return ", ".join(map(str, values[:30])) + (f" and {len(values) - 30} more" if len(values) > 30 else "")


def shorten(text: str) -> str:
    """The beginning and the end of a long name."""
    half = LONGEST_NAME // 2
    return text if len(text) <= LONGEST_NAME else f"{text[:half]}…{text[-half:]}"


def name_tag(text: str) -> str:
    """A name among other words, shortened, and isolated where it is written from right to left."""
    return f"<bdi>{escape(shorten(text))}</bdi>"


def escape(text: str) -> str:
    """Text as HTML; names of files may be of any bytes."""
    return html.escape(text.encode(errors="backslashreplace").decode())
