"""The tables of an archive: predictions.csv and failures.csv. Rows are appended whole; what a crash tore off is cut."""

import csv
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from covidjax.data.lists import CLASSES
from covidjax.data.scan.sources import split_numbers
from covidjax.data.scan.volume import format_counts
from covidjax.files import replace_file

PREDICTIONS = (
    'path',
    'series',
    'id',
    'verdict',
    'class',
    *CLASSES,
    'conformal_set',
    'novelty',
    'share_unusual',
    'home',
    'disagreement',
    'window_spread',
    'lungs_ml',
    'lesions_ml',
    'lesions_percent',
    'consolidation_percent',
    'infected_slices',
    'grade',
    'slices',
    'left_out',
    'doubts',
    'seconds',
    'run',
    'program',
)
FAILURES = ('path', 'series', 'reason', 'run', 'program')
DONE = ('path', 'signature', 'run', 'program')  # of units without a failure, to skip them without reading

Row = dict[str, str]


class Table:
    """A CSV file that grows by whole rows.

    Attributes:
      path: of the file.
      rows: what it holds.
    """

    def __init__(self, path: Path, columns: Sequence[str]):
        self.path, self._columns = path, columns
        self.rows = read_rows(path)

    def append(self, values: dict[str, Any]) -> None:
        """Appends a row, on disk when this returns. If the disk is full, the table is as before. Raises OSError."""
        row = {name: _format(values.get(name)) for name in self._columns}
        is_new = not self.path.exists()
        data = _encode([row], self._columns, with_header=is_new)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            try:
                written = os.write(descriptor, data)
                while written < len(data):
                    written += os.write(descriptor, data[written:])
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
        self.rows.append(row)

    def replace(self, rows: Sequence[Row]) -> None:
        """Replaces all rows, atomically; a table without rows keeps its header."""
        write_rows(self.path, self._columns, rows)
        self.rows = list(rows)


def _format(value: Any) -> str:
    if value is None:
        return ''
    # Rows are lines: a torn one is found by its missing end.
    return ' '.join((f'{value:.6g}' if isinstance(value, float) else str(value)).split())


def _encode(rows: Sequence[Row], columns: Sequence[str], *, with_header: bool) -> bytes:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator='\n')
    if with_header:
        writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode(errors='surrogateescape')


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Writes a table atomically."""
    with replace_file(path) as temporary:
        temporary.write_bytes(_encode(rows, columns, with_header=True))


def read_rows(path: Path) -> list[Row]:
    """Returns the rows of a table, and cuts off a row that a crash tore; none if there is no file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    size = data.rfind(b'\n') + 1
    if not size:
        path.unlink()
    elif size < len(data):
        os.truncate(path, size)
    return parse_rows(data)


def parse_rows(data: bytes) -> list[Row]:
    """Returns the rows of a table, less a last one that is not whole."""
    whole = data[: data.rfind(b'\n') + 1]
    return list(csv.DictReader(io.StringIO(whole.decode(errors='surrogateescape'))))


def merge_rows(rows: Sequence[Row], key: Callable[[Row], tuple[str, ...]]) -> list[Row]:
    """Returns the last row of each key, by path in natural order, then by series."""
    last = {key(row): row for row in rows}
    return sorted(last.values(), key=lambda row: (split_numbers(row['path']), row['series']))


def create_row(path: str, series: str, summary: dict[str, Any]) -> dict[str, Any]:
    """Returns the row of a prediction.

    Args:
      path: of the scan in the archive.
      series: its DICOM series, '' without one.
      summary: prediction.json. Cells of what it does not have stay empty.
    """
    conformal, novelty, lesions = summary.get('conformal'), summary.get('novelty') or {}, summary.get('lesions', {})
    return {
        'path': path,
        'series': series,
        'id': get_id(summary['input']['sha256']),
        'verdict': summary.get('verdict'),
        'class': summary.get('class'),
        **summary.get('probabilities', {}),
        'conformal_set': None if conformal is None else ' '.join(conformal['set']),
        'novelty': novelty.get('median'),
        'share_unusual': novelty.get('share_unusual'),
        'home': (summary.get('home') or {}).get('text'),
        'disagreement': (summary.get('members') or {}).get('disagreement'),
        'window_spread': (summary.get('windows') or {}).get('largest_spread'),
        **{name: lesions.get(name) for name in ('lungs_ml', 'lesions_ml', 'lesions_percent', 'consolidation_percent')},
        'infected_slices': lesions.get('num_infected'),
        'grade': lesions.get('grade'),
        'slices': summary['input']['num_slices'],
        'left_out': format_counts(summary['left_out']),
        'doubts': '; '.join(summary['forced']),
        'seconds': round(sum(summary['seconds'].values()), 2),
    }


def get_id(sha256: str) -> str:
    """Returns the id of a scan, which names its folder: the first 16 digits of the SHA-256 of its files."""
    return sha256[:16]
