"""Worker processes that do one round of work per request, so that two of them alternate while both stay warm.

A worker prints one line of JSON when it is ready, {'facts': ...}, and one for every line it reads: {'seconds': ...,
'items': images of the round, 'faults': page faults, 'peak_mb': peak memory of the process}. It uses only the standard
library, because the workers of both sides import it. It needs Linux for page faults and memory.
"""

import argparse
import contextlib
import json
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]


def serve(tasks: dict[str, Callable[[argparse.Namespace], tuple[Callable[[], int], dict]]]) -> None:
    """Runs the task named on the command line until standard input ends.

    A task takes the options and returns a function and a dict of facts. The function does one round and returns its
    number of images.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the driver reports the interruption
    parser = argparse.ArgumentParser()
    parser.add_argument('--task', choices=tasks, required=True)
    parser.add_argument('--model', choices=('resnet', 'efficientnet_lite0', 'lesions'), default='resnet')
    parser.add_argument('--image_size', type=int, default=224)
    parser.add_argument('--batch_size', type=int, default=16)
    parser.add_argument('--steps', type=int, default=1, help='batches per round')
    parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
    parser.add_argument('--channels_last', action='store_true')
    parser.add_argument('--engine', help='inference engine of peer_worker.py')
    parser.add_argument('--no_dead_work', action='store_true', help='a model without its dead tail and projection')
    parser.add_argument('--folder', help='folder of input data')
    parser.add_argument('--prepared_dir', help='folder of prepared slices')
    options = parser.parse_args()

    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # keeps output of libraries out of the answers

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    do_round, facts = tasks[options.task](options)
    answer(facts=facts)
    for _ in sys.stdin:
        faults, start = _count_page_faults(), time.perf_counter()
        items = do_round()
        seconds = time.perf_counter() - start
        answer(seconds=seconds, items=items, faults=_count_page_faults() - faults, peak_mb=_find_peak_memory())


def _count_page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _find_peak_memory() -> float:
    # getrusage would include the parent's memory from before exec.
    return int(re.search(r'VmHWM:\s+(\d+) kB', Path('/proc/self/status').read_text())[1]) / 1000


class Contender(NamedTuple):
    """How to start a worker.

    Attributes:
      python: interpreter.
      module: module to run.
      options: command-line options; True is a bare flag, False and None omit it.
      environment: additional environment variables.
    """

    python: str
    module: str
    options: dict[str, Any]
    environment: Mapping[str, str] = MappingProxyType({})


class Measurement(NamedTuple):
    """Results of one contender.

    Attributes:
      seconds: duration of every round.
      items: images per round.
      faults: page faults of every round.
      peak_mb: peak memory of the process, MB.
      facts: facts reported by the worker.
    """

    seconds: list[float]
    items: int
    faults: list[int]
    peak_mb: float
    facts: dict[str, Any]

    @property
    def rate(self) -> float:
        """Images per second, from the median duration."""
        return self.items / statistics.median(self.seconds)


class Worker:
    """The running process of a contender."""

    def __init__(self, contender: Contender):
        arguments = [
            f'--{name}' if value is True else f'--{name}={value}'
            for name, value in contender.options.items()
            if value is not False and value is not None
        ]
        self._name = f'{contender.module} {" ".join(arguments)}'
        self._process = subprocess.Popen(
            [contender.python, '-m', contender.module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **contender.environment},
        )

    def read(self) -> dict[str, Any]:
        """Waits for the next answer and returns it."""
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f'error: the worker `{self._name}` ended with status {self._process.wait()}; see its output above')
        return json.loads(line)

    def do_round(self) -> dict[str, Any]:
        """Requests one round and returns its answer."""
        with contextlib.suppress(BrokenPipeError):  # `read` reports a worker that has ended
            self._process.stdin.write('\n')
            self._process.stdin.flush()
        return self.read()

    def __enter__(self) -> 'Worker':
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        if sys.exc_info()[0] is not None:
            self._process.kill()
        self._process.wait()


def measure(contenders: dict[str, Contender], rounds: int, warm_up: int = 2) -> dict[str, Measurement]:
    """Alternates the contenders for `warm_up` uncounted rounds and then `rounds` counted ones."""
    with contextlib.ExitStack() as stack:
        workers, facts = {}, {}
        for name, contender in contenders.items():  # sequentially: starting a worker uses all cores
            workers[name] = stack.enter_context(Worker(contender))
            facts[name] = workers[name].read()['facts']
        answers = {name: [] for name in contenders}
        for i in range(warm_up + rounds):
            for name, worker in workers.items():
                answer = worker.do_round()
                progress = 'warm-up' if i < warm_up else f'round {i - warm_up + 1} of {rounds}'
                say(f'  {progress}: {name}: {answer["seconds"]:.2f} s')
                answers[name].append(answer)
    return {name: summarise(answers[name][warm_up:], facts[name]) for name in contenders}


def summarise(answers: Sequence[dict[str, Any]], facts: dict[str, Any]) -> Measurement:
    """Collects the answers of a contender."""
    return Measurement(
        seconds=[answer['seconds'] for answer in answers],
        items=answers[-1]['items'],
        faults=[answer['faults'] for answer in answers],
        peak_mb=answers[-1]['peak_mb'],
        facts=facts,
    )


def say(text: str) -> None:
    """Prints progress on stderr."""
    print(text, file=sys.stderr, flush=True)
