"""Tests of lost processes; `tests/faults/campaign.py` tests them in whole runs."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# These processes compute nothing, so only jax's heartbeats detect that another process is gone.
WAIT = """
import sys, threading
from covidjax.training import hosts

hosts.CONNECT_TIMEOUT_SECONDS = int(sys.argv[3])
hosts.connect(sys.argv[1], 2, int(sys.argv[2]))
print('connected', flush=True)
threading.Event().wait()
"""


def start(numbers, timeout):
    """Starts the processes with these indices, out of two."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        coordinator = f'localhost:{free.getsockname()[1]}'
    return [
        subprocess.Popen(
            [sys.executable, '-c', WAIT, coordinator, str(number), str(timeout)],
            env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in numbers
    ]


def assert_ends_with_one_line(process):
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = [line for line in said.splitlines() if line.startswith('error: ')]
    assert line == said.splitlines()[-1]
    assert 'another process of the run is gone, silent or never came' in line


def test_process_whose_first_is_killed():
    first, second = start([0, 1], timeout=60)
    with first, second:
        try:
            assert [process.stdout.readline() for process in (first, second)] == ['connected\n'] * 2
            first.kill()
            assert_ends_with_one_line(second)
        finally:
            first.kill()
            second.kill()


def test_process_whose_others_never_come():
    (first,) = start([0], timeout=1)
    with first:
        try:
            assert_ends_with_one_line(first)
        finally:
            first.kill()
