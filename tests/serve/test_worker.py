from pathlib import Path

import pytest

from covidjax.errors import TooLargeError, UserError
from covidjax.serve.limits import Limits, Refused
from covidjax.serve.worker import Job, Worker, describe_refusal
from tests.serve import fake

JOB = Job(Path('/tmp/private/abc/source'), Path('/tmp/private/abc/results'), None, force=False)


@pytest.mark.parametrize(
    ('error', 'status', 'message'),
    [
        (UserError(f'{JOB.source}: no CT in it'), 422, 'No CT in it.'),
        (UserError(f'{JOB.source}/00001.zip: a damaged zip'), 422, 'A damaged zip.'),
        (UserError('slices that fail: 00007.dcm (X)'), 422, 'Slices that fail: 00007.dcm (X).'),
        (UserError(f'cannot read {JOB.source}'), 422, 'Cannot read the upload.'),
        (TooLargeError(f'{JOB.source}: too much'), 413, 'Too much.'),
        (MemoryError(), 413, 'There is not enough memory for this scan. Upload a single series.'),
    ],
)
def test_refusals_hold_no_path_of_the_server(error, status, message):
    refused = describe_refusal(error, JOB)
    assert (refused.status, refused.message) == (status, message)


def test_a_bad_run_ends_the_start(tmp_path):
    worker = Worker(fake.load, tmp_path / 'bad', Limits())
    with pytest.raises(UserError, match='is not the workdir of a finished run'):
        worker.start()


def test_a_worker_that_can_not_start_again_costs_scans_but_no_server(tmp_path):
    worker = Worker(fake.load, tmp_path / 'bad', Limits())
    for _ in range(2):
        with pytest.raises(Refused, match='could not be started'):
            worker.predict(JOB, lambda stage: None, lambda: False)
