import os
import subprocess
import sys
import tempfile
import time

import pytest

from covidjax.errors import UserError
from covidjax.serve.folder import open_folder

HOLD = """
import time
from covidjax.serve.folder import open_folder
with open_folder() as folder:
    (folder / 'scan').write_text('private')
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    monkeypatch.setenv('TMPDIR', str(tmp_path))
    return tmp_path / f'covidjax-serve-{os.getuid()}'


def test_the_folder_is_private_and_goes(place):
    with open_folder() as folder:
        assert folder.parent == place
        assert place.stat().st_mode & 0o077 == folder.stat().st_mode & 0o077 == 0
        (folder / 'scan').mkdir()
    assert [path.name for path in place.iterdir()] == ['lock']


def test_a_killed_server_leaves_a_folder_that_the_next_one_deletes_and_only_that(place):
    held = [subprocess.Popen([sys.executable, '-c', HOLD], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        folders = [process.stdout.readline().strip() for process in held]
        held[0].kill()
        held[0].wait()
        assert os.path.exists(f'{folders[0]}/scan')
        time.sleep(0.1)
        with open_folder():
            assert not os.path.exists(folders[0])
            assert os.path.exists(f'{folders[1]}/scan')
    finally:
        for process in held:
            process.kill()
            process.wait()
            process.stdout.close()


@pytest.mark.parametrize('kind', ['open', 'link'])
def test_a_place_that_others_may_enter_is_refused(place, tmp_path, kind):
    if kind == 'open':
        place.mkdir(mode=0o755)
    else:
        (tmp_path / 'elsewhere').mkdir(mode=0o700)
        place.symlink_to(tmp_path / 'elsewhere')
    with pytest.raises(UserError, match='not a private folder'), open_folder():
        pass
