"""What all drawings share: placeholder colours that become CSS variables of `theme.css`, one style, and the way from matplotlib to SVG.

matplotlib draws with placeholders, so that the reader's light or dark mode chooses the colours. Text stays text.
"""

import io
import re
from html import escape
from itertools import count
from typing import Any

import matplotlib
from matplotlib.figure import Figure as Canvas

INK, MUTED, RULE, PAPER = "#fe1000", "#fe2000", "#fe3000", "#fe4000"
# Series 0 is neutral (a reference line), 1 to 5 are told apart by colour and marker.
SERIES = tuple(f"#fe000{index}" for index in range(6))
# Bands of a heat map: two inside a limit, four outside it, from the limit outwards.
INSIDE, OUTSIDE = ("#fe5000", "#fe5001"), ("#fe6000", "#fe6001", "#fe6002", "#fe6003")
_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    RULE: "rule",
    PAPER: "paper",
    **{colour: f"series-{index}" for index, colour in enumerate(SERIES)},
    **{colour: f"inside-{index}" for index, colour in enumerate(INSIDE)},
    **{colour: f"outside-{index}" for index, colour in enumerate(OUTSIDE)},
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "stepwell",  # the same drawing has the same ids every time
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "legend.columnspacing": 1.4,
}
_numbers = count(1)


def styled() -> Any:
    """Return a context in which matplotlib draws in the house's style."""
    return matplotlib.rc_context(_STYLE)


def canvas(width: float, height: float) -> Canvas:
    """Return an empty drawing of a size in inches."""
    return Canvas(figsize=(width, height), facecolor=PAPER, layout="constrained")


def svg(drawing: Canvas, label: str) -> str:
    """Return a drawing as `<svg ...>...</svg>` whose colours are CSS variables and whose ids are unique within one process.

    Args:
        drawing: made inside `styled()`, which must still be open.
        label: what it shows, read by screen readers.
    """
    buffer = io.StringIO()
    drawing.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _themed(buffer.getvalue(), label)


def _themed(text: str, label: str) -> str:
    """Strip what only a file needs, make ids unique, replace placeholder colours by CSS variables."""
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    prefix = f"f{next(_numbers)}-"
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'href="#', f'href="#{prefix}', text)
    text = re.sub(r"url\(#", f"url(#{prefix}", text)
    for placeholder, variable in _VARIABLES.items():
        text = text.replace(placeholder, f"var(--{variable})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
