"""Divides training slices into strata that are drawn equally often, whatever their numbers."""

from collections.abc import Sequence
from typing import NamedTuple

from covidjax.data.lists import Row

BALANCES = ('none', 'class', 'class_and_source')


class Stratum(NamedTuple):
    """Records that are drawn as one group.

    Attributes:
      share: of the stratum in the stream; the shares of all strata add up to 1.
      records: record numbers, ascending, at least one.
    """

    share: float
    records: list[int]


def divide_strata(rows: Sequence[Row], balance: str) -> list[Stratum]:
    """Divides the slices of a split.

    Args:
      rows: of the split, in record order.
      balance: 'none': the stream has no strata. 'class': every class that occurs has the same share.
        'class_and_source': moreover, every source of a class has the same share of that class; an unknown source counts
        as one.

    Returns:
      The strata; none for 'none'.

    Raises:
      ValueError: `balance` is none of `BALANCES`.
    """
    if balance not in BALANCES:
        raise ValueError(f'balance={balance!r} must be one of {", ".join(BALANCES)}')
    if balance == 'none':
        return []
    members: dict[int, dict[str, list[int]]] = {}
    for number, row in enumerate(rows):
        source = row.source if balance == 'class_and_source' else ''
        members.setdefault(row.label, {}).setdefault(source, []).append(number)
    return [
        Stratum(1 / len(members) / len(by_source), records)
        for _, by_source in sorted(members.items())
        for _, records in sorted(by_source.items())
    ]
