import errno
import json
import re

import pytest

from covidjax.errors import UserError
from covidjax.files import replace_file, report_full_disk, write_json


def test_file_is_replaced_whole(tmp_path):
    path = tmp_path / 'a.txt'
    path.write_text('old')
    with replace_file(path) as temporary:
        temporary.write_text('new')
        assert path.read_text() == 'old'
    assert path.read_text() == 'new'
    assert list(tmp_path.iterdir()) == [path]


def test_failure_keeps_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / 'a.txt'
    path.write_text('old')

    def fail():
        with replace_file(path) as temporary:
            temporary.write_text('half')
            raise RuntimeError('disk')

    with pytest.raises(RuntimeError, match='disk'):
        fail()
    assert path.read_text() == 'old'
    assert list(tmp_path.iterdir()) == [path]


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match='JSON'):
        write_json(tmp_path / 'a.json', {'x': float('nan')})
    assert list(tmp_path.iterdir()) == []
    write_json(tmp_path / 'a.json', {'x': 1})
    assert json.loads((tmp_path / 'a.json').read_text()) == {'x': 1}


@pytest.mark.parametrize(
    'error', [OSError(errno.ENOSPC, 'No space left on device'), ValueError("Failed to write [os_error_code='122']")]
)
def test_full_disk_is_a_users_error(tmp_path, error):
    message = f'no room is left to write to {tmp_path} .*{re.escape(str(error))}'
    with pytest.raises(UserError, match=message), report_full_disk(tmp_path):
        raise error


@pytest.mark.parametrize('error', [OSError(errno.EACCES, 'denied'), ValueError('shapes differ'), UserError('typo')])
def test_other_errors_stay(tmp_path, error):
    with pytest.raises(type(error), match=re.escape(str(error))), report_full_disk(tmp_path):
        raise error
