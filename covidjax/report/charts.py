"""Plot style: SVG figures that follow the page's light or dark colours, embedded as data URIs."""

import base64
import contextlib
import io

import matplotlib
from matplotlib.figure import Figure

from covidjax.data.lists import CLASSES
from covidjax.report.page import Picture

COLOURS = dict(zip(CLASSES, ('#2f8f9d', '#d98a2b', '#c2456b'), strict=True))
FIRST, SECOND = '#3b76c4', '#8a5fb0'  # for series that are not classes
GREY = '#8a8a8a'
_INK = '#010203'  # placeholder that `create_picture` replaces with currentColor
_STYLE = {
    'axes.edgecolor': _INK,
    'axes.grid': True,
    'axes.labelcolor': _INK,
    'axes.spines.right': False,
    'axes.spines.top': False,
    'axes.titlesize': 10,
    'figure.facecolor': 'none',
    'axes.facecolor': 'none',
    'font.family': 'sans-serif',
    'font.size': 10,
    'grid.alpha': 0.35,
    'grid.color': GREY,
    'legend.frameon': False,
    'savefig.facecolor': 'none',
    'svg.fonttype': 'none',
    'svg.hashsalt': 'covidjax',
    'text.color': _INK,
    'text.parse_math': False,
    'xtick.color': _INK,
    'ytick.color': _INK,
}
# Follows the light or dark colours of the page.
SCHEME = '<style>:root{color:#1c1e21}@media(prefers-color-scheme:dark){:root{color:#e4e6ea}}</style>'


def use_style() -> contextlib.AbstractContextManager[None]:
    """Returns a context manager that applies the plot style."""
    return matplotlib.rc_context(_STYLE)


def create_picture(figure: Figure, alt: str) -> Picture:
    """Returns a figure as an embedded SVG picture with the text alternative `alt`."""
    buffer = io.StringIO()
    with use_style():
        figure.savefig(buffer, format='svg', metadata={'Date': None, 'Creator': None, 'Format': None, 'Type': None})
    svg = buffer.getvalue()
    svg = svg[svg.index('<svg') :].replace(_INK, 'currentColor').replace('<defs>', f'{SCHEME}<defs>', 1)
    uri = f'data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}'
    return Picture(alt, uri, figure.get_figwidth())
