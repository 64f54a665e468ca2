"""Self-contained HTML pages: tables, pictures and the one style of all reports."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from timo.data.contract import atomic_output

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; color: #222;
       padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { border-bottom: 1px solid #ddd; padding: .25rem .8rem; text-align: left;
         font-variant-numeric: tabular-nums; vertical-align: top; }
img { max-width: 100%; }
.error { color: #b00020; } .warning { color: #9a5b00; } .note { color: #555; }
"""


def write_html(path: Path, title: str, parts: Sequence[str]) -> None:
    """Write a page of HTML fragments, whole or not at all."""
    head = f'<meta charset="utf-8"><title>{text(title)}</title><style>{STYLE}</style>'
    with atomic_output(path) as partial:
        partial.write_text(f"<!doctype html>{head}{''.join(parts)}", encoding="utf-8")


def figure(rows: int, columns: int, width: float, height: float):
    """A matplotlib figure (inches) that needs no display, and its axes in reading order."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pages need matplotlib: pip install timo[train]") from error
    drawn = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawn)
    return drawn, drawn.subplots(rows, columns, squeeze=False).ravel()


def image(drawn, description: str) -> str:
    """A figure as an embedded PNG."""
    png = io.BytesIO()
    drawn.savefig(png, format="png", dpi=100)
    data = base64.b64encode(png.getvalue()).decode()
    return f'<img alt="{text(description)}" src="data:image/png;base64,{data}">'


def table(head: Sequence, rows: Sequence[Sequence], classes: Sequence[str] | None = None) -> str:
    """An HTML table; `classes` gives a style class to each row."""
    lines = ["<tr>" + "".join(f"<th>{text(cell)}</th>" for cell in head) + "</tr>"]
    for number, row in enumerate(rows):
        kind = f' class="{classes[number]}"' if classes else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def text(value: object) -> str:
    return html.escape(str(value))
