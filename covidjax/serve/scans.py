"""The scans of a server: their state, their folders, the queue, and their end."""

import secrets
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from covidjax.serve.limits import Limits, Refused, format_bytes


@dataclass(eq=False)
class Scan:
    """A scan.

    Attributes:
      id: random; who knows it may see the scan.
      folder: private; source/ holds the upload, results/ what the worker writes.
      state: 'uploading', 'queued', 'running', 'done' or 'refused'.
      stage: of a running prediction.
      series, force: see `worker.Job`.
      refused: why, in the state 'refused'.
      changed: seconds of a monotonic clock at the last change of the state.
      num_bytes: on disk.
      is_deleted: nobody wants it any more.
    """

    id: str
    folder: Path
    state: str = 'uploading'
    stage: str = ''
    series: str | None = None
    force: bool = False
    refused: Refused | None = None
    changed: float = 0.0
    num_bytes: int = 0
    is_deleted: bool = False

    @property
    def source(self) -> Path:
        """Folder of the uploaded files."""
        return self.folder / 'source'

    @property
    def results(self) -> Path:
        """Folder of the results."""
        return self.folder / 'results'


class Scans:
    """All scans of a server. Safe to use from several threads.

    Args:
      root: private folder.
      limits: of the server.
      keep_seconds: a scan is deleted this long after its prediction.
    """

    def __init__(self, root: Path, limits: Limits, keep_seconds: float):
        self._root, self._limits, self._keep_seconds = root, limits, keep_seconds
        self._scans: dict[str, Scan] = {}
        self._queue: list[Scan] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self.num_bytes = 0  # of all scans on disk

    def open(self) -> Scan:
        """Reserves a place in the queue for a scan that will be uploaded.

        Raises:
          Refused: too many scans wait, or their files take too much room.
        """
        with self._changed:
            busy = sum(scan.state in ('uploading', 'queued', 'running') for scan in self._scans.values())
            if busy >= self._limits.num_waiting:
                raise Refused(429, 'queue', f'{busy} scans are waiting already. Try again in a minute.')
            self._check_disk()
            scan = Scan(name := secrets.token_urlsafe(16), self._root / name, changed=time.monotonic())
            scan.source.mkdir(parents=True)
            self._scans[scan.id] = scan
            return scan

    def _check_disk(self) -> None:
        if self.num_bytes >= self._limits.disk_bytes:
            limit = format_bytes(self._limits.disk_bytes)
            raise Refused(429, 'disk', f'The scans on this server take {limit}. Delete some, or try again later.')

    def add_bytes(self, scan: Scan, number: int) -> None:
        """Counts bytes of an upload.

        Raises:
          Refused: the upload or all scans together are too large.
        """
        with self._changed:
            scan.num_bytes += number
            self.num_bytes += number
            if scan.num_bytes > self._limits.upload_bytes:
                limit = format_bytes(self._limits.upload_bytes)
                raise Refused(413, 'bytes', f'The upload is larger than {limit}. Upload a single series.')
            self._check_disk()

    def enqueue(self, scan: Scan, *, series: str | None, force: bool) -> None:
        """Puts a scan at the end of the queue.

        Raises:
          Refused: it waits or runs already, or was deleted.
        """
        with self._changed:
            if scan.is_deleted:
                raise self._miss()
            if scan.state in ('queued', 'running'):
                raise Refused(409, 'busy', 'This scan is waiting or being predicted already.')
            busy = sum(other.state in ('uploading', 'queued', 'running') for other in self._scans.values())
            if scan.state != 'uploading' and busy >= self._limits.num_waiting:
                raise Refused(429, 'queue', f'{busy} scans are waiting already. Try again in a minute.')
            shutil.rmtree(scan.results, ignore_errors=True)
            scan.results.mkdir()
            scan.series, scan.force, scan.refused = series, force, None
            self._set_state(scan, 'queued')
            self._queue.append(scan)

    def _set_state(self, scan: Scan, state: str) -> None:
        scan.state, scan.stage, scan.changed = state, '', time.monotonic()
        self._changed.notify_all()

    def get(self, name: str) -> Scan:
        """Returns a scan. Raises Refused if there is none of this id."""
        with self._changed:
            if name not in self._scans:
                raise self._miss()
            return self._scans[name]

    def _miss(self) -> Refused:
        minutes = f'{self._keep_seconds / 60:g}'
        return Refused(404, 'unknown', f'No such scan. Scans are deleted {minutes} minutes after the prediction.')

    def take(self) -> Scan | None:
        """Waits for the next scan in the queue and marks it as running; None once the server closes."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._is_closed)
            if self._is_closed:
                return None
            scan = self._queue.pop(0)
            self._set_state(scan, 'running')
            return scan

    def finish(self, scan: Scan, refused: Refused | None) -> None:
        """Ends a prediction. The files of a scan that was deleted meanwhile go now."""
        with self._changed:
            scan.refused = refused
            self._set_state(scan, 'done' if refused is None else 'refused')
            if not scan.is_deleted:
                size = sum(file.stat().st_size for file in scan.folder.rglob('*') if file.is_file())
                self.num_bytes += size - scan.num_bytes
                scan.num_bytes = size
                return
        shutil.rmtree(scan.folder, ignore_errors=True)

    def delete(self, name: str) -> None:
        """Deletes a scan and its files; the worker stops a running prediction. Raises Refused for an unknown id."""
        scan = self.get(name)
        with self._changed:
            if self._scans.pop(name, None) is None:
                return  # another thread was faster
            scan.is_deleted = True
            self.num_bytes -= scan.num_bytes
            is_running = scan.state == 'running'
            if scan in self._queue:
                self._queue.remove(scan)
        if not is_running:
            shutil.rmtree(scan.folder, ignore_errors=True)

    def expire(self) -> None:
        """Deletes the scans whose time is over."""
        with self._changed:
            now = time.monotonic()
            old = [
                scan.id
                for scan in self._scans.values()
                if scan.state in ('done', 'refused') and now - scan.changed > self._keep_seconds
            ]
        for name in old:
            self.delete(name)

    def close(self) -> None:
        """Ends the waiting of `take`."""
        with self._changed:
            self._is_closed = True
            for scan in self._scans.values():
                scan.is_deleted = True
            self._changed.notify_all()

    def describe(self, scan: Scan) -> dict[str, Any]:
        """Returns what a client may know of the state of a scan."""
        with self._changed:
            keeps = scan.state in ('done', 'refused')
            seconds = time.monotonic() - scan.changed
            refused = scan.refused
            return {
                'id': scan.id,
                'state': scan.state,
                'place': self._queue.index(scan) + 1 if scan in self._queue else None,
                'stage': scan.stage or None,
                'seconds': round(seconds, 1),
                'forced': scan.force,
                'deleted_in_seconds': round(max(0.0, self._keep_seconds - seconds)) if keeps else None,
                'error': None if refused is None else refused.describe(),
            }

    def count_states(self) -> dict[str, int]:
        """Returns the number of scans by state."""
        counts = dict.fromkeys(('uploading', 'queued', 'running', 'done', 'refused'), 0)
        with self._changed:
            for scan in self._scans.values():
                counts[scan.state] += 1
        return counts
