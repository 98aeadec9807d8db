"""Progress of long work: a bar on a terminal, a line now and then in a file or a pipe."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

log = logging.getLogger(__name__)

MIN_SECONDS, MIN_SHARE = 30, 0.1  # between two lines: both must have passed


class Lines:
    """Takes the place of a bar in a file or a pipe: logs a line every 10 % or 30 seconds, whichever is later."""

    def __init__(self, title: str, total: int, unit: str, initial: int = 0):
        self._title, self._total, self._unit = title, total, unit
        self._done = self._shown = initial
        self._time, self._note = time.monotonic(), ''

    def __enter__(self) -> 'Lines':
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def set_postfix_str(self, note: str, refresh: bool = True) -> None:
        """Sets what is shown behind the count."""
        self._note = note

    def update(self, count: int = 1) -> None:
        """Counts, and logs if it is time."""
        self._done += count
        now = time.monotonic()
        if now - self._time < MIN_SECONDS or self._done - self._shown < MIN_SHARE * self._total:
            return
        self._time, self._shown = now, self._done
        note = f', {self._note}' if self._note else ''
        share = self._done / self._total
        log.info('%s: %d of %d %ss (%.0f %%)%s', self._title, self._done, self._total, self._unit, 100 * share, note)


def open_progress(title: str, total: int, unit: str, *, initial: int = 0, is_shown: bool = True) -> Any:
    """Returns a context with `update(count)` and `set_postfix_str(note)`.

    Args:
      title: of the work.
      total: number of units.
      unit: singular, e.g. 'slice'.
      initial: units that are done already.
      is_shown: False shows nothing, for all processes of a run but the first.
    """
    if sys.stderr.isatty() or not is_shown:
        from tqdm import tqdm  # only here: an audit of lists and a help text do without it

        return tqdm(desc=title, total=total, unit=f' {unit}', initial=initial, disable=not is_shown, leave=False)
    return Lines(title, total, unit, initial)


def track(items: Iterable[Any], title: str, total: int, unit: str, *, is_shown: bool = True) -> Iterator[Any]:
    """Yields items and shows how many have gone by (see `open_progress`)."""
    with open_progress(title, total, unit, is_shown=is_shown) as progress:
        for item in items:
            yield item
            progress.update()
