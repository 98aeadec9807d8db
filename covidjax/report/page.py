"""Self-contained HTML pages: text escaped, pictures inside, one style for light, dark, phone and paper."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from covidjax.files import replace_file


class Table(NamedTuple):
    """Numbers.

    Attributes:
      title: what the numbers are.
      columns: heads.
      rows: one value per column: text, a count (int), a ratio (float), an interval [low, high] or None.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


class Picture(NamedTuple):
    """A plot or an image: its text alternative, a data URI and its width in inches at a font size of 10 points."""

    alt: str
    uri: str
    width: float


def write_page(path: Path, template: str, **values: Any) -> None:
    """Renders a template of this package with `values` and writes it, whole or not at all."""
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
    """Returns a value of a table as text: '12,345', '0.500', '0.250 to 0.750', an en dash for None."""
    if value is None:
        return '\N{EN DASH}'
    if isinstance(value, int):
        return f'{value:,}'
    if isinstance(value, float):
        return f'{value:.3f}' if abs(value) < 10 else f'{value:,.0f}'
    if isinstance(value, list):
        return ' to '.join(map(format_cell, value))
    return str(value)
