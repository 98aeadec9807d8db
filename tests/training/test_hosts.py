"""Processes that are lost; `tests/faults/campaign.py` does it to whole runs."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Neither computes anything: only jax's watch over the processes tells the second that the first is gone.
WAIT = """
import sys, threading
from covidjax.training import hosts

hosts.connect(sys.argv[1], 2, int(sys.argv[2]))
print('connected', flush=True)
threading.Event().wait()
"""


def test_abort_by_jax_ends_with_one_line():
    with socket.socket() as free:
        free.bind(('localhost', 0))
        coordinator = f'localhost:{free.getsockname()[1]}'
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
    first, second = (
        subprocess.Popen(
            [sys.executable, '-c', WAIT, coordinator, str(number)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    )
    try:
        assert [process.stdout.readline() for process in (first, second)] == ['connected\n'] * 2
        first.kill()
        _, said = second.communicate(timeout=60)
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
    assert second.returncode == 1
    assert [line for line in said.splitlines() if line.startswith('error: ')] == said.splitlines()[-1:]
    assert 'another process of the run is gone' in said.splitlines()[-1]
