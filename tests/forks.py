r"""Runs main.py many times without starting Python and importing jax as often.

One process imports all that main.py imports in the course of a command. For every line on stdin, a JSON list of the
files for stdout and stderr and of arguments, it forks a child, which is `python main.py <arguments>` from there on. It
answers with the child's process ID, then with its exit status.
"""

import json
import os
import runpy
import signal
import sys

import scipy.optimize
import scipy.stats  # noqa: F401
import sklearn.ensemble
import sklearn.linear_model
import sklearn.metrics  # noqa: F401

import covidjax.audit
import covidjax.experiment.export
import covidjax.predict.scan
import covidjax.report.scans
import covidjax.report.slices
import covidjax.training.hosts
import covidjax.training.runtime  # noqa: F401


def main() -> None:
    """Serves until stdin ends."""
    for line in sys.stdin:
        stdout, stderr, *arguments = json.loads(line)
        child = os.fork()
        if not child:
            for number, path in ((0, os.devnull), (1, stdout), (2, stderr)):
                os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
            signal.alarm(300)  # ends a child that hangs
            sys.argv = ['main.py', *arguments]
            runpy.run_path('main.py', run_name='__main__')
            sys.exit()
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == '__main__':
    main()
