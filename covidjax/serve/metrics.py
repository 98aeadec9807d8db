"""Counters of the server in the text format of Prometheus."""

import threading
from collections import Counter
from collections.abc import Mapping

# https://prometheus.io/docs/instrumenting/exposition_formats/
CONTENT_TYPE = 'text/plain; version=0.0.4; charset=utf-8'
_HELP = {
    'requests_total': ('counter', 'Answers by HTTP status.'),
    'refusals_total': ('counter', 'Refused requests and refused scans by reason.'),
    'predictions_total': ('counter', 'Finished predictions by outcome.'),
    'prediction_seconds_total': ('counter', 'Seconds spent on predictions.'),
    'worker_starts_total': ('counter', 'Starts of the process that predicts.'),
    'worker_memory_bytes': ('gauge', 'Resident memory of the process that predicts.'),
    'scans': ('gauge', 'Scans by state.'),
    'disk_bytes': ('gauge', 'Size of all uploads and results.'),
}


class Metrics:
    """Counters by name and label; safe to use from several threads."""

    def __init__(self):
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()

    def count(self, name: str, label: str = '', amount: float = 1) -> None:
        """Adds to a counter. `label` is e.g. 'code="queue"'."""
        with self._lock:
            self._counts[name, label] += amount

    def format(self, gauges: Mapping[tuple[str, str], float]) -> str:
        """Returns all counters, and values of now by (name, label), as text."""
        with self._lock:
            values = {**self._counts, **gauges}
        lines = []
        for name, (kind, text) in _HELP.items():
            lines += [f'# HELP covidjax_{name} {text}', f'# TYPE covidjax_{name} {kind}']
            for (of, label), value in sorted(values.items()):
                if of == name:
                    lines.append(f'covidjax_{name}{label and f"{{{label}}}"} {value:.17g}')
        return '\n'.join(lines) + '\n'
