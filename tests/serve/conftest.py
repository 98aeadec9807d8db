import contextlib
import time

import pytest

pytest.importorskip('starlette', reason='the page needs covidjax[serve]')
pytest.importorskip('uvicorn', reason='the page needs covidjax[serve]')
pytest.importorskip('python_multipart', reason='the page needs covidjax[serve]')

from starlette.testclient import TestClient

from covidjax.serve.app import Server
from covidjax.serve.limits import Limits
from covidjax.serve.scans import Scans
from covidjax.serve.worker import Worker
from tests.serve import fake


class Client(TestClient):
    """A client of a server without a model, and what tests ask of it.

    Attributes:
      root: folder of the scans.
      server: the `Server`.
      worker: its `Worker`.
    """

    def upload(self, *contents, names=None, **options):
        """Uploads files of these contents."""
        names = names or [f'{number}.dcm' for number in range(len(contents))]
        files = [('files', (name, content)) for name, content in zip(names, contents, strict=True)]
        return self.post('/api/scans', files=files, **options)

    def wait(self, name, *states):
        """Returns the status of a scan once it is in one of these states, by default 'done' or 'refused'."""
        for _ in range(3_000):
            status = self.get(f'/api/scans/{name}').json()
            if status['state'] in (states or ('done', 'refused')):
                return status
            time.sleep(0.02)
        raise AssertionError(status)

    def predict(self, *contents, **options):
        """Uploads files and waits for the end."""
        answer = self.upload(*contents, **options)
        assert answer.status_code == 202, answer.text
        return self.wait(answer.json()['id'])

    def list_files(self):
        return sorted(path.relative_to(self.root).as_posix() for path in self.root.rglob('*'))


@contextlib.contextmanager
def open_client(root, *, token=None, host='127.0.0.1', keep_seconds=1800, load=fake.load, workdir=None, **limits):
    """Yields a client of a server that keeps its scans in `root`; by default the fake predictor serves it."""
    limits = Limits(**limits)
    worker = Worker(load, root if load is fake.load else workdir, limits)
    about = worker.start()
    server = Server(Scans(root, limits, keep_seconds), worker, limits, about)
    with Client(server.create_app(host=host, token=token), base_url='http://127.0.0.1:8765') as client:
        client.root, client.server, client.worker = root, server, worker
        yield client


@pytest.fixture(scope='module')
def client(tmp_path_factory):
    with open_client(tmp_path_factory.mktemp('scans')) as client:
        yield client
