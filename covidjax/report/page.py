"""Self-contained HTML pages: escaped text, embedded pictures, one style for light, dark, phone and print."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from covidjax.files import replace_file


class Table(NamedTuple):
    """A table on a page.

    Attributes:
      title: caption.
      columns: headings.
      rows: one value per column: str, count (int), ratio (float), interval [low, high], or None.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


class Picture(NamedTuple):
    """A plot or an image: text alternative, data URI, and width in inches at a font size of 10 points."""

    alt: str
    uri: str
    width: float


def write_page(path: Path, template: str, **values: Any) -> None:
    """Renders a template of this package with `values` and writes it atomically."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader('covidjax.report', '.'),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters['cell'] = format_cell
    environment.filters['is_number'] = lambda value: not isinstance(value, str)
    page = environment.get_template(template).render(values)
    with replace_file(path) as temporary:
        temporary.write_text(page, encoding='utf-8')


def format_cell(value: Any) -> str:
    """Formats a table value: '12,345', '0.500', '0.250 to 0.750', an en dash for None."""
    if value is None:
        return '\N{EN DASH}'
    if isinstance(value, int):
        return f'{value:,}'
    if isinstance(value, float):
        return f'{value:.3f}' if abs(value) < 10 else f'{value:,.0f}'
    if isinstance(value, list):
        return ' to '.join(map(format_cell, value))
    return str(value)
