import pytest

from covidjax.training import digests


@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'state').mkdir()
    (tmp_path / 'state' / 'array').write_bytes(b'weights')
    (tmp_path / 'metadata').write_bytes(b'{}')
    digests.write_digests(tmp_path)
    return tmp_path


def test_a_whole_folder_has_no_damage(folder):
    assert digests.is_finished(folder)
    assert digests.find_damage(folder) == []


def test_a_changed_and_a_missing_file_are_named(folder):
    (folder / 'state' / 'array').write_bytes(b'weighty')
    (folder / 'metadata').unlink()
    assert digests.find_damage(folder) == [
        'metadata is missing, but sha256.json lists it',
        'state/array differs from its digest in sha256.json',
    ]


def test_every_flipped_bit_of_the_digests_is_found_and_the_message_names_them(folder):
    path = folder / 'sha256.json'
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in range(8):
            content = bytearray(whole)
            content[position] ^= 1 << bit
            path.write_bytes(content)
            faults = digests.find_damage(folder)
            assert faults, (position, bit)
            assert all('sha256.json' in fault for fault in faults), (position, bit, faults)
