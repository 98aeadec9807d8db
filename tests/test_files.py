import json

import pytest

from covidjax.files import replace_file, write_json


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
