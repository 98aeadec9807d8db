import resource

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from covidjax.training.tensorboard import open_curves


def read_events(folder):
    """Returns the events of the only file in a folder; a record is length, checksum, content, checksum."""
    (path,) = folder.iterdir()
    content, events = path.read_bytes(), []
    while content:
        length = int.from_bytes(content[:8], 'little')
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return events


def test_points_and_where_they_replace_earlier_ones(tmp_path):
    with open_curves(tmp_path / 'curves', 7) as add_point:
        add_point('loss', 0.5, 8)
    _, start, point = read_events(tmp_path / 'curves')
    assert (start.step, start.session_log.status) == (7, SessionLog.START)
    assert (point.step, point.summary.value[0].tag, point.summary.value[0].simple_value) == (8, 'loss', 0.5)


def test_full_disk_is_an_error_and_not_a_hang(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write():
        with open_curves(tmp_path / 'curves', 0) as add_point:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
            for step in range(10_000):
                add_point('loss', 0.5, step)

    try:
        with pytest.raises(OSError, match='large'):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
