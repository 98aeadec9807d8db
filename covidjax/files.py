"""Files that are either whole or absent."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` to write to, and renames it into place if the block ends well."""
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
    """Writes indented JSON; NaN and infinities are errors, since JSON has none."""
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + '\n')
