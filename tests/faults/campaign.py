"""Injects faults into training runs, resumes each run with the same command and compares the results.

  python tests/faults/campaign.py                     a few faults of each kind, some minutes on two cores
  python tests/faults/campaign.py --kills=50 --damages=12 --full_disks=4
  python tests/faults/campaign.py --processes=2 --freezes=2     runs on two processes, one of them killed or frozen

Faults are kills, damaged checkpoints, full disks and frozen processes. A run survives if its parameters, optimizer
state, batch statistics, history (without timings) and predictions equal those of an undisturbed run bit for bit. With
several processes, the remaining ones must end in time, each with one error line. The last line is the summary. The exit
status is 1 if any run was lost or any process ended without an error line. Full disks are small memory disks; they
require the right to mount.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODEL = (
    '--config.{0}model.stage_sizes=(1,1)',
    '--config.{0}model.width=4',
    '--config.{0}model.block=basic',
    '--config.{0}model.stem=small',
    '--config.{0}model.tail_blocks=1',
    '--config.{0}model.pretrained=',
)
STOP_SECONDS = 70  # limit for the other processes to stop after one is killed or frozen, see docs/devices.md
TIMINGS = ('seconds', 'val_seconds', 'examples_per_second')
KINDS = ('kill', 'kill while saving', 'freeze', 'stop', 'truncate', 'empty', 'flip', 'full disk')


class Run:
    """A running training command with one or several processes in one workdir."""

    def __init__(self, arguments, workdir, log, num_processes):
        with socket.socket() as free:
            free.bind(('localhost', 0))
            port = free.getsockname()[1]
        self.log = log.open('a+')
        command = [sys.executable, 'main.py', *arguments, f'--workdir={workdir}']
        several = [f'--coordinator=localhost:{port}', f'--num_processes={num_processes}']
        self.processes = [
            subprocess.Popen(
                [*command, *([*several, f'--process_id={i}'] if num_processes > 1 else [])],
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=self.log,
            )
            for i in range(num_processes)
        ]
        self.start = self.log.tell()

    def is_running(self):
        return all(process.poll() is None for process in self.processes)

    def wait(self, timeout=600):
        """Waits for all processes. Returns whether all succeeded."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.wait(max(deadline - time.monotonic(), 0.1))
        return not any(process.returncode for process in self.processes)

    def kill(self, victim=0):
        """Kills one process. Returns the seconds until all have stopped."""
        start = time.monotonic()
        self.processes[victim].kill()
        self.wait(STOP_SECONDS)
        return time.monotonic() - start

    def freeze(self, victim):
        """Freezes one process with open sockets until the others have stopped. Returns the seconds that took."""
        start = time.monotonic()
        self.processes[victim].send_signal(signal.SIGSTOP)
        others = [process for process in self.processes if process is not self.processes[victim]]
        for process in others:
            process.wait(STOP_SECONDS)
        seconds = time.monotonic() - start
        self.processes[victim].kill()
        self.wait()
        return seconds

    def stop(self, victim):
        """Asks one process to stop and waits until all have stopped."""
        self.processes[victim].terminate()
        self.wait()

    def read_log(self):
        self.log.seek(self.start)
        return self.log.read()


def list_checkpoints(workdir):
    """Returns the numbers of the finished checkpoints of the latest state."""
    return [int(path.parent.name) for path in workdir.glob('checkpoints/latest/*/sha256.json')]


def read_outcome(workdir):
    """Returns everything that must be bitwise equal at the end of a run, by name."""
    import jax
    import orbax.checkpoint as ocp

    outcome = {
        'predictions': (workdir / 'predictions.csv').read_bytes(),
        'history': [
            {name: value for name, value in json.loads(line).items() if name not in TIMINGS}
            for line in (workdir / 'metrics.jsonl').read_text().splitlines()
        ],
    }
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # also for checkpoints of several processes
    for kind, item in (('latest', 'state'), ('best', 'variables')):
        newest = max((workdir / 'checkpoints' / kind).iterdir(), key=lambda path: int(path.name))
        checkpointer = ocp.StandardCheckpointer()
        template = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            checkpointer.metadata(newest / item).item_metadata.tree,
        )
        tree = checkpointer.restore(newest / item, template)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            leaf = jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
            outcome[f'{kind}{jax.tree_util.keystr(path)}'] = (leaf.shape, bytes(memoryview(leaf).cast('B')))
    return outcome


def damage(folder, kind, rng):
    """Damages one file of a checkpoint. Returns its name."""
    path = rng.choice([path for path in sorted(folder.rglob('*')) if path.is_file() and path.stat().st_size])
    content = bytearray(path.read_bytes())
    if kind == 'flip':
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(
        b'' if kind == 'empty' else content[: rng.randrange(len(content))] if kind == 'truncate' else content
    )
    return path.name


@contextlib.contextmanager
def mount_small_disk(folder, num_bytes):
    """Mounts a small memory disk. Yields a function that enlarges it."""
    folder.mkdir()
    subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={num_bytes}', 'tmpfs', folder], check=True)
    try:
        yield lambda: subprocess.run(['mount', '-o', 'remount,size=1g', folder], check=True)
    finally:
        subprocess.run(['umount', folder], check=True)


def can_mount(folder):
    try:
        with mount_small_disk(folder / 'probe', 4096):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


class Campaign:
    """Injects faults into runs of one experiment and counts the outcomes."""

    def __init__(self, name, arguments, folder, num_processes, rng):
        self.name, self.arguments, self.folder, self.num_processes, self.rng = (
            name,
            arguments,
            folder,
            num_processes,
            rng,
        )
        self.survived, self.lost = collections.Counter(), collections.Counter()
        self.stops = []  # several processes: (fault, seconds until the others stopped, whether all printed an error)
        self.num_runs = 0
        whole = folder / f'{name}-whole'
        for attempt in (whole, folder / f'{name}-again'):  # the second run is timed because it compiles nothing
            start = time.monotonic()
            run = self.start(attempt)
            if not run.wait():
                sys.exit(f'the {name} run without faults failed:\n{run.read_log()}')
            self.seconds = time.monotonic() - start
        self.expected = read_outcome(whole)
        if read_outcome(attempt) != self.expected:
            sys.exit(f'two {name} runs without faults differ')
        self.size = sum(path.stat().st_size for path in whole.rglob('*') if path.is_file())

    def get_log(self, workdir):
        """Returns the path of the log of all runs in a workdir. It is never on a full disk."""
        return self.folder / f'{workdir.name}.log'

    def start(self, workdir):
        return Run(self.arguments, workdir, self.get_log(workdir), self.num_processes)

    def new_workdir(self):
        self.num_runs += 1
        return self.folder / f'{self.name}-{self.num_runs}'

    def settle(self, workdir, faults, notes):
        """Resumes a run to its end and counts its faults as survived or lost."""
        run = self.start(workdir)
        ended = run.wait()
        missing = [note for note in notes if note not in self.get_log(workdir).read_text()]
        outcome = read_outcome(workdir) if ended else {}
        names = self.expected.keys() | outcome.keys() if ended else ()
        different = sorted(name for name in names if outcome.get(name) != self.expected.get(name))
        good = ended and not missing and not different
        (self.survived if good else self.lost).update(faults)
        if not good:
            print(f'LOST {workdir}: {faults}; ended {ended}, not logged {missing}, different {different[:5]}')
            print(run.read_log()[-2000:])
        else:
            shutil.rmtree(workdir)
        print(f'{self.name}: {"survived" if good else "lost"} {", ".join(faults)}', flush=True)

    def kill(self, count):
        """Kills runs `count` times at random moments, about half of them while a checkpoint is written."""
        done = 0
        while done < count:
            workdir, faults = self.new_workdir(), []
            while done < count and len(faults) < 5:
                run = self.start(workdir)
                if self.num_processes > 1:
                    wait_for_data(run)
                kind = self.rng.choice(('kill', 'kill while saving', 'stop') if done % 5 == 0 else KINDS[:2])
                if kind == 'kill while saving':
                    skip = self.rng.randrange(6)
                    seen = set()
                    while run.is_running() and len(seen) <= skip:
                        seen |= {path.name for path in workdir.glob('checkpoints/*/*tmp*')}
                    time.sleep(self.rng.uniform(0, 0.15))
                else:
                    deadline = time.monotonic() + self.rng.uniform(0, self.seconds)
                    while run.is_running() and time.monotonic() < deadline:
                        time.sleep(0.005)
                if not run.is_running():
                    run.wait()
                    break
                victim = self.rng.randrange(self.num_processes)
                if kind == 'stop':
                    run.stop(victim)
                else:
                    self.note_stop(run, kind, victim, run.kill(victim))
                faults.append(kind)
                done += 1
            if faults:
                self.settle(workdir, faults, [])

    def freeze(self, count):
        """Freezes one process of each run, the first, then the second and so on, and resumes after the others stop."""
        for i in range(count):
            workdir, victim = self.new_workdir(), i % self.num_processes
            run = self.start(workdir)
            wait_for_data(run)
            time.sleep(self.rng.uniform(0, self.seconds / 2))
            if run.is_running():
                self.note_stop(run, 'freeze', victim, run.freeze(victim))
                self.settle(workdir, ['freeze'], [])

    def note_stop(self, run, kind, victim, seconds):
        """With several processes, records how those without a fault stopped."""
        if self.num_processes == 1:
            return
        lines = [line for line in run.read_log().replace('\r', '\n').splitlines() if line.startswith('error: ')]
        # After the test phase, the first process finishes without the others.
        failed = [process for i, process in enumerate(run.processes) if i != victim and process.returncode]
        self.stops.append((kind, seconds, len(lines) == len(failed)))
        print(f'  {kind} of process {victim}: the others stopped after {seconds:.1f} s, saying {lines}', flush=True)

    def damage(self, count):
        """Kills runs that have two checkpoints and damages the newer one, up to three times a run."""
        done = 0
        while done < count:
            workdir, faults, notes, damaged = self.new_workdir(), [], [], -1
            while done < count and len(faults) < 3:
                run = self.start(workdir)
                while run.is_running() and (len(found := list_checkpoints(workdir)) < 2 or max(found) <= damaged):
                    time.sleep(0.005)
                if not run.is_running():
                    run.wait()
                    break
                run.kill()
                damaged = max(list_checkpoints(workdir))
                newest = workdir / 'checkpoints' / 'latest' / str(damaged)
                faults.append(('truncate', 'empty', 'flip')[done % 3])
                notes += [f'{newest}: ', damage(newest, faults[-1], self.rng)]
                done += 1
            if not faults:
                sys.exit(f'{workdir} ended before it had two checkpoints:\n{run.read_log()}')
            self.settle(workdir, faults, notes)

    def fill_disk(self, count):
        """Runs on disks that are too small, then enlarges them and resumes."""
        for _ in range(count):
            workdir = self.new_workdir()
            disk = workdir.with_name(f'{workdir.name}-disk')
            with mount_small_disk(disk, int(self.size * self.rng.uniform(0.2, 0.9))) as make_room:
                workdir = disk / workdir.name
                ended = self.start(workdir).wait()
                make_room()
                if not ended:
                    self.settle(workdir, ['full disk'], ['error: no room is left'])


def wait_for_data(run):
    """Waits until the data are loaded. Before that, processes wait minutes for a missing process."""
    while run.is_running() and 'train: ' not in run.read_log():
        time.sleep(0.1)


def describe_stops(stops):
    """Describes how fast the other processes stopped and how often all printed an error; '' for one process."""
    parts = []
    for what, kinds in (('kill', KINDS[:2]), ('freeze', ('freeze',))):
        chosen = [(seconds, said) for kind, seconds, said in stops if kind in kinds]
        if chosen:
            said = sum(said for _, said in chosen)
            slowest = max(seconds for seconds, _ in chosen)
            parts.append(
                f'; the others stopped within {slowest:.1f} s of a {what}, {said} of {len(chosen)} times saying why'
            )
    return ''.join(parts)


def main():
    """Runs the campaign and prints a summary line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=4, help='kills by SIGKILL or SIGTERM per experiment')
    parser.add_argument('--damages', type=int, default=3, help='damaged newest checkpoints per experiment')
    parser.add_argument('--full_disks', type=int, default=1, help='full disks per experiment')
    parser.add_argument('--processes', type=int, default=1)
    parser.add_argument('--freezes', type=int, default=0, help='frozen processes per experiment')
    parser.add_argument('--experiments', nargs='+', default=['att2', 'seq'], choices=['att2', 'seq'])
    parser.add_argument('--seed', type=int, default=0)
    options = parser.parse_args()

    from covidjax.data.phantom import PhantomOptions, write_phantoms

    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ |= {
            'TFDS_DATA_DIR': str(folder / 'prepared'),
            'XDG_CACHE_HOME': str(folder / 'cache'),
            'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',  # only the first run of an experiment compiles
        }
        raw = folder / 'raw'
        write_phantoms(
            raw, PhantomOptions(num_train=9, num_val=6, num_test=6, image_size=64, min_slices=8, max_slices=20)
        )
        shared = ('--config.data.image_size=32', '--config.train.checkpoint_steps=5')
        commands = {
            'att2': [
                f'--config=configs/att2.py:{raw}',
                *shared,
                *(argument.format('') for argument in MODEL),
                '--config.train.batch_size=16',
                '--config.train.steps_per_epoch=12',
                '--config.train.num_epochs=4',
            ],
            'seq': [
                f'--config=configs/seq.py:{raw}',
                *shared,
                f'--config.extractor={folder / "att2-whole"}',
                '--config.data.min_slices=1',
                '--config.model.hidden=8',
                '--config.train.batch_size=4',
                '--config.train.num_epochs=6',
            ],
        }
        if 'att2' not in options.experiments:  # seq always needs the extractor
            Run(commands['att2'], folder / 'att2-whole', folder / 'att2-whole.log', options.processes).wait()
        with_disks = options.full_disks and can_mount(folder)
        campaigns = []
        for experiment in options.experiments:
            campaign = Campaign(
                experiment, commands[experiment], folder, options.processes, random.Random(options.seed)
            )
            campaigns.append(campaign)
            campaign.kill(options.kills)
            if options.processes > 1:
                campaign.freeze(options.freezes)
            campaign.damage(options.damages)
            if with_disks:
                campaign.fill_disk(options.full_disks)
    survived = sum((campaign.survived for campaign in campaigns), collections.Counter())
    lost = sum((campaign.lost for campaign in campaigns), collections.Counter())
    tally = ', '.join(
        f'{kind} {survived[kind]}/{survived[kind] + lost[kind]}' for kind in KINDS if (survived + lost)[kind]
    )
    disks = '' if with_disks or not options.full_disks else '; full disks not tried: no right to mount'
    stops = [stop for campaign in campaigns for stop in campaign.stops]
    print(
        f'survived {survived.total()}, lost {lost.total()} ({tally}{disks}{describe_stops(stops)}; '
        f'{time.monotonic() - start:.0f} s)'
    )
    sys.exit(lost.total() > 0 or not all(said for _, _, said in stops))


if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    main()
