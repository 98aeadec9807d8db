"""The result of one check of an audit, and words for it."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from covidjax.report.page import Picture, Table

OK, LOOK, BROKEN, NOT_CHECKED = VERDICTS = ('ok', 'look', 'broken', 'not checked')


@dataclasses.dataclass
class Check:
    """The result of one check.

    Attributes:
      name: identifier, '<group>.<what>'.
      title: shown to people.
      verdict: one of `VERDICTS`. 'look' needs a person's judgement; 'broken' is an error for any use of the data.
      reason: why, in one sentence.
      faults: one line per finding.
      tables: the numbers behind the verdict.
      pictures: functions that draw the plots of the HTML report.
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
    """Returns '1 file', '2,000 files'; `things` is the plural if it is not `thing` + 's'."""
    return f'{number:,} {thing if number == 1 else things or thing + "s"}'


def join_words(words: Sequence[str]) -> str:
    """Returns 'a', 'a and b', 'a, b and c'."""
    return ' and '.join(filter(None, (', '.join(words[:-1]), words[-1]))) if words else ''
