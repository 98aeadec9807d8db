"""The server as a process: its start and end, slow clients, and the clients of docs/serve.md."""

import contextlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from covidjax.errors import UserError
from covidjax.serve.server import is_loopback, read_token, serve
from tests.serve import fake

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def start_server(folder):
    """Yields the process and the port of a server without a model."""
    command = [sys.executable, '-m', 'tests.serve.run_fake', str(folder), '0']
    environment = {**os.environ, 'TMPDIR': str(folder)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            line = process.stdout.readline()
            yield process, int(re.search(r'http://127.0.0.1:(\d+)/', line)[1])
        finally:
            process.kill()


@pytest.fixture(scope='module')
def port(tmp_path_factory):
    with start_server(tmp_path_factory.mktemp('server')) as (_, port):
        yield port


def send(port, contents, names=None):
    body = b''.join(
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n\r\n%s\r\n' % (name.encode(), content)
        for name, content in zip(names or ['a.dcm'] * len(contents), contents, strict=True)
    )
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=30)
    with contextlib.closing(connection):
        headers = {'Content-Type': 'multipart/form-data; boundary=x'}
        connection.request('POST', '/api/scans', body + b'--x--\r\n', headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def get(port, path):
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=30)
    with contextlib.closing(connection):
        connection.request('GET', path)
        answer = connection.getresponse()
        return answer.status, answer.read()


def wait(port, name):
    for _ in range(1_200):
        status = json.loads(get(port, f'/api/scans/{name}')[1])
        if status['state'] in ('done', 'refused'):
            return status
        time.sleep(0.05)
    raise AssertionError(status)


def list_scans(folder):
    return list(folder.glob('covidjax-serve-*/server-*/*'))


def end(process, port, kind, folder):
    """Ends a server by a signal while it predicts."""
    wait(port, send(port, [b'good'])[1]['id'])
    send(port, [b'hang'])
    assert list_scans(folder)
    process.send_signal(kind)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert rest.splitlines()[-1] == 'Stopped; all scans are deleted.'
    assert 'Traceback' not in rest
    assert list_scans(folder) == []


def test_ctrl_c_deletes_all_scans(tmp_path):
    with start_server(tmp_path) as (process, port):
        end(process, port, signal.SIGINT, tmp_path)


def test_after_a_kill_the_worker_ends_and_the_next_start_deletes_the_scans(tmp_path):
    with start_server(tmp_path) as (process, port):
        wait(port, send(port, [b'good'])[1]['id'])
        [worker] = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()[-1:]
        process.kill()
        process.wait()
        assert list_scans(tmp_path)
    with start_server(tmp_path) as (process, port):
        assert list_scans(tmp_path) == []
        end(process, port, signal.SIGTERM, tmp_path)
    for _ in range(100):
        if not Path(f'/proc/{worker}').exists():
            break
        time.sleep(0.05)
    else:
        raise AssertionError('the worker outlived its server')


def test_slow_uploads_are_ended(port):
    with socket.create_connection(('127.0.0.1', port), timeout=20) as client:
        client.sendall(
            b'POST /api/scans HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n'
            b'Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n'
        )
        start = time.monotonic()
        answer = client.recv(10_000)
    assert answer.startswith(b'HTTP/1.1 408')
    assert 0.8 < time.monotonic() - start < 20
    with socket.create_connection(('127.0.0.1', port), timeout=20) as client:
        client.sendall(
            b'POST /api/scans HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n'
            b'Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n'
        )
        start = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - start < 15:
                client.sendall(b'A')
                time.sleep(0.3)
        assert time.monotonic() - start < 15


def test_uploads_that_break_off_leave_nothing(port):
    before = json.loads(get(port, '/api/about')[1])
    with socket.create_connection(('127.0.0.1', port), timeout=20) as client:
        client.sendall(
            b'POST /api/scans HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n'
            b'Content-Type: multipart/form-data; boundary=x\r\n\r\n'
            b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\nabc'
        )
    time.sleep(0.3)
    metrics = get(port, '/metrics')[1].decode()
    assert 'covidjax_scans{state="uploading"} 0' in metrics
    assert json.loads(get(port, '/api/about')[1]) == before


def test_many_clients_get_answers(port):
    """Good, broken and huge uploads at once: no 5xx, and every good one that is accepted is predicted."""
    contents = {'good': b'good', 'broken': b'error', 'huge': bytes(21_000_000), 'crash': b'crash'}
    outcomes = []

    def work(kind):
        for _ in range(200):
            status, answer = send(port, [contents[kind]])
            if status != 429:
                break
            time.sleep(0.1)
        if status == 202:
            answer = wait(port, answer['id'])
            status = 200 if answer['state'] == 'done' else answer['error']['status']
        outcomes.append((kind, status))

    threads = [
        threading.Thread(target=work, args=(kind,)) for kind in [*['good'] * 12, *['broken', 'huge'] * 3, 'crash']
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == sorted(
        [*[('good', 200)] * 12, *[('broken', 422)] * 3, *[('huge', 413)] * 3, ('crash', 422)]
    )
    assert 'status="5' not in get(port, '/metrics')[1].decode()


class TestOptions:
    @pytest.mark.parametrize(
        ('options', 'message'),
        [
            ({'host': '0.0.0.0'}, 'pass --token_file'),
            ({'host': 'my.host'}, 'pass --token_file'),
            ({'keep_minutes': 0.0}, '--keep_minutes=0'),
            ({'port': 99_999}, 'cannot listen on 127.0.0.1, port 99999'),
            ({'host': '192.0.2.1', 'token_file': 'good'}, 'cannot listen on 192.0.2.1'),
            ({'token_file': 'none'}, 'not a readable file'),
            ({'token_file': 'short'}, '16 characters'),
            ({'token_file': 'open'}, 'chmod 600'),
        ],
    )
    def test_bad_ones(self, tmp_path, options, message):
        for name, token, mode in (('good', 'a' * 32, 0o600), ('short', 'a', 0o600), ('open', 'a' * 32, 0o644)):
            (tmp_path / name).write_text(token)
            (tmp_path / name).chmod(mode)
        if 'token_file' in options:
            options = options | {'token_file': tmp_path / options['token_file']}
        with pytest.raises(UserError, match=re.escape(message)):
            serve(tmp_path, load=fake.load, **options)

    def test_a_taken_port(self, tmp_path, port):
        with pytest.raises(UserError, match='choose another --port'):
            serve(tmp_path, load=fake.load, port=port)

    def test_a_bad_run(self, tmp_path):
        with pytest.raises(UserError, match='not the workdir'):
            serve(tmp_path / 'bad', load=fake.load, port=0)

    def test_loopback(self):
        assert all(map(is_loopback, ('127.0.0.1', '127.9.9.9', '::1', 'localhost')))
        assert not any(map(is_loopback, ('0.0.0.0', '::', '10.0.0.1', 'localhost.evil.example')))

    def test_token(self, tmp_path):
        (tmp_path / 'token').write_text('0123456789abcdef\n')
        (tmp_path / 'token').chmod(0o600)
        assert read_token(tmp_path / 'token') == '0123456789abcdef'


def test_every_attack_of_the_docs_has_its_tests():
    text = (ROOT / 'docs/serve.md').read_text()
    rows = re.findall(r'^\|.*test_.*\|$', text, re.MULTILINE)
    assert len(rows) > 12
    for row in rows:
        for path, names in re.findall(r'`([\w/]+\.py)`: ((?:`\w+`(?:, )?)+)', row):
            code = (ROOT / 'tests' / path).read_text()
            for name in re.findall(r'`(\w+)`', names):
                assert f'def {name}(' in code, f'{path}: {name}'


class TestClientsOfTheDocs:
    """The clients in docs/serve.md, as they stand but for the port."""

    @staticmethod
    def read(language, port, tmp_path):
        text = (ROOT / 'docs/serve.md').read_text()
        [code] = [block for block in re.findall(rf'```{language}\n(.*?)```', text, re.DOTALL) if '/api/scans' in block]
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, 'w') as archive:
            archive.writestr('a', 'b')
        (tmp_path / 'scan.zip').write_bytes(b'good' + buffer.getvalue())
        return code.replace('127.0.0.1:8765', f'127.0.0.1:{port}')

    def check(self, tmp_path, output):
        assert json.loads((tmp_path / 'prediction.json').read_text())['verdict'] == 'covid19'
        assert 'covid19' in output

    def test_curl(self, port, tmp_path):
        if shutil.which('curl') is None:
            pytest.skip('no curl')
        code = self.read('sh', port, tmp_path)
        done = subprocess.run(['bash', '-eu', '-c', code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        self.check(tmp_path, done.stdout)

    def test_python(self, port, tmp_path):
        code = self.read('python', port, tmp_path)
        command = [sys.executable, '-c', code]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        self.check(tmp_path, done.stdout)
