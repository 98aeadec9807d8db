"""Load on `covidjax serve`: clients that post good, broken and huge uploads at once, for two minutes.

  python benchmarks/serve.py --workdir=/tmp/run

Good ones are synthetic DICOM scans of 20 slices, broken ones zips of damaged DICOM, huge ones announce 3 GB. A client
that gets 429 waits a second and tries again. Printed are the answers by kind and status, the latency of good scans from
the post that was accepted to the result, and the largest resident memory of the server and of its worker. The exit
status is 1 after a 5xx, a connection that broke, or an accepted scan without an answer.
"""

import argparse
import collections
import http.client
import io
import json
import random
import re
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.scan_files import encode_dicom, make_chest, make_dicom

BOUNDARY = b'boundary'
HEAD = b'--boundary\r\nContent-Disposition: form-data; name="files"; filename="scan.zip"\r\n\r\n'
TAIL = b'\r\n--boundary--\r\n'


def create_uploads():
    """Returns a good and a broken zip."""
    # 5 mm wide, so that the lungs have the size of lungs.
    slices = [make_dicom(pixels, -5.0 * t, PixelSpacing=[5, 5]) for t, pixels in enumerate(make_chest())]
    files = list(map(encode_dicom, slices))
    broken = [data[: len(data) // 2] for data in files]
    zips = []
    for chosen in (files, broken):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_DEFLATED) as archive:
            for number, data in enumerate(chosen):
                archive.writestr(f'{number}.dcm', data)
        zips.append(buffer.getvalue())
    return zips


class Load:
    """Counts of one measurement."""

    def __init__(self, port, seconds):
        self.port, self.end = port, time.monotonic() + seconds
        self.answers, self.latencies, self.lock = collections.Counter(), [], threading.Lock()
        self.good, self.broken = create_uploads()

    def count(self, kind, outcome):
        with self.lock:
            self.answers[kind, outcome] += 1

    def call(self, method, path, body=None, length=None):
        """Returns status and JSON of an answer, (0, reason) if there is none."""
        connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=120)
        headers = {'Content-Type': 'multipart/form-data; boundary=boundary'} if body is not None else {}
        if length is not None:
            headers['Content-Length'] = str(length)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read() or b'null')
        except OSError as error:
            return 0, {'error': {'code': type(error).__name__}}
        finally:
            connection.close()

    def work(self, seed):
        """Posts until the time is over, and waits for what was accepted."""
        rng = random.Random(seed)
        while time.monotonic() < self.end:
            kind = rng.choices(('good', 'broken', 'huge'), (6, 2, 2))[0]
            start = time.monotonic()
            if kind == 'huge':
                status, answer = self.call('POST', '/api/scans', iter([HEAD, *[bytes(1_000_000)] * 50]), 3_000_000_000)
                self.count(kind, status or answer['error']['code'])
                continue
            body = HEAD + (self.good if kind == 'good' else self.broken) + TAIL
            status, answer = self.call('POST', '/api/scans', body)
            self.count(kind, status or answer['error']['code'])
            if status == 429:
                time.sleep(1)
                continue
            if status != 202:
                continue
            name = answer['id']
            while True:
                status, answer = self.call('GET', f'/api/scans/{name}')
                if status != 200 or answer['state'] in ('done', 'refused'):
                    break
                time.sleep(0.2)
            outcome = answer['state'] if status == 200 else f'lost ({status or answer["error"]["code"]})'
            self.count(kind, outcome)
            if kind == 'good' and outcome == 'done':
                with self.lock:
                    self.latencies.append(time.monotonic() - start)
            self.call('DELETE', f'/api/scans/{name}')


def watch(process, peaks, stop):
    """Keeps the largest resident memory of the server and of its worker, in MB."""
    while not stop.wait(0.2):
        [*children] = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
        for name, pids in (('server', [process.pid]), ('worker', children)):
            for pid in pids:
                try:
                    status = Path(f'/proc/{pid}/status').read_text()
                except OSError:
                    continue
                found = re.search(r'VmRSS:\s+(\d+)', status)
                peaks[name] = max(peaks.get(name, 0), int(found[1]) / 1000 if found else 0)


def main():
    """Measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--workdir', required=True)
    parser.add_argument('--clients', type=int, default=50)
    parser.add_argument('--seconds', type=float, default=120)
    options = parser.parse_args()
    command = [sys.executable, 'main.py', '--mode=serve', f'--workdir={options.workdir}', '--port=0']
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        port = int(re.search(r':(\d+)/', process.stdout.readline())[1])
        load, peaks, stop = Load(port, options.seconds), {}, threading.Event()
        watcher = threading.Thread(target=watch, args=(process, peaks, stop))
        watcher.start()
        threads = [threading.Thread(target=load.work, args=(seed,)) for seed in range(options.clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stop.set()
        watcher.join()
        process.terminate()
        process.wait()
    for (kind, outcome), count in sorted(load.answers.items(), key=str):
        print(f'{kind:<8}{outcome!s:<16}{count:>7,}')
    if load.latencies:
        quantiles = ', '.join(f'{q:.0%} {np.quantile(load.latencies, q):.1f} s' for q in (0.5, 0.95, 1))
        print(f'latency of {len(load.latencies):,} good scans: {quantiles}')
    print(', '.join(f'{name} at most {peak:,.0f} MB' for name, peak in peaks.items()))
    good = {200, 202, 413, 429, 'done', 'refused'}
    faults = {key: count for key, count in load.answers.items() if key[1] not in good or key == ('good', 'refused')}
    print(f'faults: {faults or "none"}')
    sys.exit(bool(faults))


if __name__ == '__main__':
    main()
