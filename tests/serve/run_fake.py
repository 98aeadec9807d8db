"""`covidjax serve` without a model: python -m tests.serve.run_fake <workdir> <port>."""

import signal
import sys
from pathlib import Path

from covidjax.serve.limits import Limits
from covidjax.serve.server import serve
from tests.serve import fake

if __name__ == '__main__':
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as the command line does
    limits = Limits(upload_bytes=20_000_000, idle_seconds=1, upload_seconds=4)
    serve(Path(sys.argv[1]), port=int(sys.argv[2]), limits=limits, load=fake.load)
