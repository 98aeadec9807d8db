"""Atomic file writes, and clear errors when a write fails."""

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from covidjax.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it to `path` if the block succeeds, deletes it otherwise."""
    path = Path(path)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.stem}-', suffix=path.suffix)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically. NaN and infinities raise ValueError because JSON has none."""
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + '\n')


@contextlib.contextmanager
def report_write_errors(folder: Path, option: str) -> Iterator[None]:
    """Turns an OSError into a UserError that names `folder` and the option to change."""
    try:
        yield
    except OSError as error:
        raise UserError(f'cannot write to {folder} ({error.strerror}): choose another {option}') from error


@contextlib.contextmanager
def report_full_disk(folder: Path) -> Iterator[None]:
    """Turns the errors of a full disk or an exhausted quota into a UserError that names `folder`."""
    try:
        yield
    except (OSError, ValueError) as error:
        # The checkpoint array writer reports a full disk as a ValueError.
        codes = [f"os_error_code='{code}'" for code in FULL]
        if getattr(error, 'errno', None) not in FULL and not any(code in str(error) for code in codes):
            raise
        raise UserError(
            f'no room is left to write to {folder} ({error}): make room and run the same command again; files '
            'saved earlier are kept'
        ) from error
