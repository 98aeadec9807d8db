"""What one check of an audit says."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from covidjax.report.page import Picture, Table

OK, LOOK, BROKEN, NOT_CHECKED = VERDICTS = ('ok', 'look', 'broken', 'not checked')


@dataclasses.dataclass
class Check:
    """One check.

    Attributes:
      name: identifier, '<group>.<what>'.
      title: for people.
      verdict: one of `VERDICTS`. 'look' is for a person to judge; 'broken' is wrong whatever one wants with the data.
      reason: of the verdict, one sentence.
      faults: what was found, each named.
      tables: the numbers behind it.
      pictures: draw the plots, for the HTML report only.
    """

    name: str
    title: str
    verdict: str
    reason: str
    faults: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: list[Callable[[], Picture]] = dataclasses.field(default_factory=list)


def find_worst(checks: Iterable[Check]) -> str:
    """Returns the worst verdict: 'broken', else 'look', else 'ok', else 'not checked'."""
    found = {check.verdict for check in checks}
    return next((verdict for verdict in (BROKEN, LOOK, OK) if verdict in found), NOT_CHECKED)


def count_things(number: int, thing: str, things: str = '') -> str:
    """Returns '1 file', '2,000 files'; `things` is the plural where it is not `thing` + 's'."""
    return f'{number:,} {thing if number == 1 else things or thing + "s"}'


def join_words(words: Sequence[str]) -> str:
    """Returns 'a', 'a and b', 'a, b and c'."""
    return ' and '.join(filter(None, (', '.join(words[:-1]), words[-1]))) if words else ''
