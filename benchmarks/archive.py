"""Scans an hour of `predict --archive` beside a loop over `--input`, the memory of both, and what the model waits for.

  python benchmarks/archive.py --workdir=/tmp/run

The scans are phantoms of whole lungs, 512 x 512, in uncompressed DICOM, drawn once into runs/benchmarks/archive. Both
sides start as commands of their own, write every page and take turns. The loop gets all scans in one command, so that
it loads the model once. Peak memory is that of all processes of a side, each at its peak.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from covidjax.data.phantom import render_volume
from tests.scan_files import encode_dicom, make_dicom

FOLDER = Path('runs/benchmarks/archive')
DISTINCT = 3  # volumes; the scans differ in noise


def write_scans(folder, count, num_slices):
    """Writes phantoms, unless they are there."""
    if (folder / 'written').exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    volumes = [render_volume(num_slices, 256, label, seed=label).repeat(2, 1).repeat(2, 2) for label in range(DISTINCT)]
    rng = np.random.default_rng(0)
    for number in range(count):
        scan = folder / f'p{number:03d}'
        scan.mkdir(parents=True)
        noise = rng.integers(-20, 21, (512, 512), dtype=np.int16)
        for place, hu in enumerate(volumes[number % DISTINCT]):
            uids = {'study': f'1.2.{number}', 'series': f'1.2.{number}.1'}
            tags = {'PixelSpacing': [0.7, 0.7], 'SliceThickness': 2, 'SOPInstanceUID': ''}
            slice_ = make_dicom(np.clip(hu + noise, -1024, 3071), -2.0 * place, **uids, **tags)
            (scan / f'{place:04d}').write_bytes(encode_dicom(slice_))
    (folder / 'written').touch()


def read_peaks(pid):
    """Returns the peak memory in MB of a process and its descendants, by process ID."""
    peaks = {}
    for process in [pid, *list_descendants(pid)]:
        try:
            status = Path(f'/proc/{process}/status').read_text()
        except OSError:
            continue
        found = re.search(r'VmHWM:\s+(\d+)', status)
        if found:
            peaks[process] = int(found[1]) / 1024
    return peaks


def list_descendants(pid):
    try:
        children = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    except OSError:
        return []
    return [int(child) for child in children] + [d for child in children for d in list_descendants(int(child))]


def time_command(arguments):
    """Runs a command; returns its seconds, its processor seconds, the sum and the highest of the peaks, its output."""
    before = os.times()
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, 'main.py', '--mode=predict', *arguments], stdout=subprocess.PIPE)
    peaks, is_over = {}, threading.Event()

    def watch():
        while not is_over.wait(0.2):
            for pid, peak in read_peaks(process.pid).items():
                peaks[pid] = max(peaks.get(pid, 0), peak)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output = process.communicate()[0].decode()
    seconds = time.perf_counter() - start
    is_over.set()
    watcher.join()
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    if process.returncode:
        sys.exit(f'{arguments} failed: {output}')
    return {
        'seconds': seconds,
        'cpu_seconds': used,
        'memory_mb': sum(peaks.values()),
        'largest_mb': max(peaks.values()),
        'last_line': output.strip().splitlines()[-1],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', required=True, help='of a finished run')
    parser.add_argument('--scans', type=int, default=40)
    parser.add_argument('--slices', type=int, default=150)
    parser.add_argument('--rounds', type=int, default=1)
    parser.add_argument('--pages', default='all')
    arguments = parser.parse_args()
    folder = FOLDER / f'{arguments.scans}x{arguments.slices}'
    write_scans(folder, arguments.scans, arguments.slices)
    inputs = [f'--input={path}' for path in sorted(folder.iterdir()) if path.is_dir()]
    results = []
    for _ in range(arguments.rounds):
        for side in ('loop', 'archive'):
            output = FOLDER / 'output'
            shutil.rmtree(output, ignore_errors=True)
            flags = inputs if side == 'loop' else [f'--archive={folder}', f'--pages={arguments.pages}']
            found = time_command([f'--workdir={arguments.workdir}', f'--output={output}', *flags])
            results.append({'side': side, 'scans_an_hour': 3600 * arguments.scans / found['seconds'], **found})
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    speeds = {
        side: float(np.median([r['scans_an_hour'] for r in results if r['side'] == side]))
        for side in ('loop', 'archive')
    }
    ratio = speeds['archive'] / speeds['loop']
    print(f'loop {speeds["loop"]:.0f}, archive {speeds["archive"]:.0f} scans an hour: {ratio:.2f} times')
    (FOLDER / 'results.json').write_text(json.dumps(results, indent=2))


if __name__ == '__main__':
    main()
