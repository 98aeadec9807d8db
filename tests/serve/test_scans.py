import pytest

from covidjax.serve.limits import Limits, Refused
from covidjax.serve.scans import Scans


@pytest.fixture
def scans(tmp_path):
    return Scans(tmp_path, Limits(num_waiting=3), keep_seconds=1800)


def add(scans, size=10):
    scan = scans.open()
    (scan.source / '00001').write_bytes(bytes(size))
    scans.add_bytes(scan, size)
    scans.enqueue(scan, series=None, force=False)
    return scan


def test_scans_run_in_order_and_bytes_are_counted(scans, tmp_path):
    first, second = add(scans), add(scans, 20)
    assert scans.num_bytes == 30
    assert scans.take() is first
    assert (first.state, scans.describe(second)['place']) == ('running', 1)
    (first.results / 'prediction.json').write_bytes(bytes(5))
    scans.finish(first, None)
    assert scans.num_bytes == 35
    for scan in (first, second):
        scans.delete(scan.id)
    assert scans.num_bytes == 0
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_running_scan_go_when_its_worker_is_done(scans):
    scan = add(scans)
    scans.take()
    scans.delete(scan.id)
    assert scan.is_deleted
    assert scan.folder.exists()
    scans.finish(scan, None)
    assert not scan.folder.exists()
    assert scans.num_bytes == 0


def test_a_deleted_scan_is_not_queued_again(scans):
    scan = add(scans)
    scans.finish(scans.take(), Refused(422, 'doubts', 'No lungs.', can_force=True))
    scans.delete(scan.id)
    for act in (
        lambda: scans.enqueue(scan, series=None, force=True),
        lambda: scans.get(scan.id),
        lambda: scans.delete(scan.id),
    ):
        with pytest.raises(Refused) as caught:
            act()
        assert (caught.value.status, caught.value.code) == (404, 'unknown')


def test_only_finished_scans_expire(tmp_path):
    scans = Scans(tmp_path, Limits(), keep_seconds=0)
    done, running, waiting = add(scans), add(scans), add(scans)
    scans.finish(scans.take(), None)
    assert scans.take() is running
    scans.expire()
    with pytest.raises(Refused):
        scans.get(done.id)
    assert [scans.get(scan.id).state for scan in (running, waiting)] == ['running', 'queued']


def test_closing_ends_the_wait_and_the_running_scan(scans):
    scan = add(scans)
    scans.take()
    scans.close()
    assert scan.is_deleted
    assert scans.take() is None
