"""What the server accepts, and how it refuses what goes beyond."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limits:
    """Limits of one server.

    Attributes:
      upload_bytes: of one upload.
      num_files: of one upload.
      upload_seconds: for one upload.
      idle_seconds: without a byte of an upload.
      num_waiting: scans that are uploaded, wait or run.
      disk_bytes: of all scans and their results.
      predict_seconds: for one prediction.
      memory_bytes: of the process that predicts.
    """

    upload_bytes: int = 2_000_000_000
    num_files: int = 5_000
    upload_seconds: float = 900
    idle_seconds: float = 30
    num_waiting: int = 20
    disk_bytes: int = 10_000_000_000
    predict_seconds: float = 900
    memory_bytes: int = 8_000_000_000


class Refused(Exception):
    """The server does not do what it was asked.

    Attributes:
      status: HTTP status, 4xx.
      code: one word for programs.
      message: sentence for people, and the way out.
      can_force: the input is doubtful, and a prediction can be forced.
    """

    def __init__(self, status: int, code: str, message: str, *, can_force: bool = False):
        super().__init__(status, code, message)
        self.status, self.code, self.message, self.can_force = status, code, message, can_force

    def describe(self) -> dict[str, Any]:
        """Returns the refusal for clients."""
        return {'status': self.status, 'code': self.code, 'message': self.message, 'can_force': self.can_force}


def format_bytes(number: int) -> str:
    """Returns e.g. '2 GB' or '300 MB'."""
    return f'{number / 1e9:g} GB' if number >= 1e9 else f'{number / 1e6:g} MB'
