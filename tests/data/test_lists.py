import collections
import itertools

import pytest

from covidjax.data import lists
from covidjax.errors import UserError

GOOD = {
    'train': ['CP_1_11_0000.png 1 0 0 9 9', 'NCP_2_12_0000.png 2 0 0 9 9', 'Normal_3_13_0000.png 0 0 0 9 9'],
    'val': ['CP_4_14_0003.png 1 -2 1 9 9', 'CP_4_14_0004.png 1 0 1 9 9'],
    'test': ['Normal_5_15_0000.png 0 0 0 512 512'],
}


def write_lists(directory, version='2A', **changes):
    for split, lines in {**GOOD, **changes}.items():
        data = lines if isinstance(lines, bytes) else ''.join(f'{line}\n' for line in lines).encode()
        (directory / f'{split}_COVIDx_CT-{version}.txt').write_bytes(data)
    return str(directory)


def get_error(directory):
    with pytest.raises(UserError) as caught:
        lists.read_lists(str(directory))
    assert '\n' not in str(caught.value)
    return str(caught.value)


def test_rows(tmp_path):
    rows = lists.read_lists(write_lists(tmp_path))
    assert list(rows) == ['train', 'val', 'test']
    assert [len(r) for r in rows.values()] == [3, 2, 1]
    assert rows['val'][0] == lists.Row('CP_4_14_0003.png', 1, (-2, 1, 9, 9), 'CP_4_14', 'CP_4', 3)


def test_sources_of_metadata(tmp_path, caplog):
    path = write_lists(tmp_path)
    (tmp_path / 'metadata.csv').write_text('patient id,source\nCP_4, A \nNCP_2,B\nother,C\n')
    rows = lists.read_lists(path)
    assert [row.source for row in rows['train']] == ['', 'B', '']
    assert {row.source for row in rows['val']} == {'A'}
    without = {split: [row._replace(source='') for row in of_split] for split, of_split in rows.items()}
    assert lists.compute_fingerprint(rows) == lists.compute_fingerprint(without)
    (tmp_path / 'metadata.csv').write_text('patient,source\nCP_4,A\n')
    assert lists.read_lists(path) == without
    assert 'sources of the patients are unknown' in caplog.text
    assert "no column 'patient id'" in caplog.text


def test_bom_crlf_tabs_and_trailing_blank_lines_are_accepted(tmp_path):
    text = '\ufeff' + '\r\n'.join(line.replace(' ', '\t') for line in GOOD['train']) + '\r\n\r\n \n'
    rows = lists.read_lists(write_lists(tmp_path, train=text.encode()))
    assert [row.label for row in rows['train']] == [1, 2, 0]


@pytest.mark.parametrize(
    ('file', 'scan', 'index', 'patient'),
    [
        ('NCP_1013_2577_0002.png', 'NCP_1013_2577', 2, 'NCP_1013'),
        ('CP_12_3456_0010.png', 'CP_12_3456', 10, 'CP_12'),
        ('Normal_1688_117_0000.png', 'Normal_1688_117', 0, 'Normal_1688'),
        ('normal1_patient190_SR_2_IM00003.png', 'normal1_patient190_SR_2', 3, 'patient190'),
        ('normal5_patient190_SR_2_IM00003.png', 'normal5_patient190_SR_2', 3, 'patient190'),
        ('cdnormal4_patient146_SR_2_IM00006.png', 'cdnormal4_patient146_SR_2', 6, 'patient146'),
        ('2covid_patient37_SR_3_IM00011.png', '2covid_patient37_SR_3', 11, 'patient37'),
        ('LIDC-IDRI-0236-1.3.6.1.4.1.14-0035.png', 'LIDC-IDRI-0236-1.3.6.1.4.1.14', 35, 'LIDC-IDRI-0236'),
        ('radiopaedia_36_86526_0-0040.png', 'radiopaedia_36_86526_0', 40, 'radiopaedia_36_86526'),
        ('radiopaedia-76335-86001-2-0040.png', 'radiopaedia-76335-86001-2', 40, 'radiopaedia-76335'),
        ('coronacases_003-0101.png', 'coronacases_003', 101, 'coronacases_003'),
        ('volume-covid19-A-0437_ct-0008.png', 'volume-covid19-A-0437_ct', 8, 'volume-covid19-A-0437'),
        ('volume-covid19-A-0196_1-0008.png', 'volume-covid19-A-0196_1', 8, 'volume-covid19-A-0196_1'),
        ('volume-covid19-A-0186-0008.png', 'volume-covid19-A-0186', 8, 'volume-covid19-A-0186'),
        ('STOIC-7293-0102.png', 'STOIC-7293', 102, 'STOIC-7293'),
        ('HUST-Patient152-0021.png', 'HUST-Patient152', 21, 'HUST-Patient152'),
        ('COVIDCTMD-P002-IM0025.png', 'COVIDCTMD-P002', 25, 'COVIDCTMD-P002'),
        ('COVIDCTMD-normal075-IM0001.png', 'COVIDCTMD-normal075', 1, 'COVIDCTMD-normal075'),
        (
            'A002304-01-10-1901-NA-CT-ABD-AND-PELVIS-WITH-IV-CONT-76655-2-0007.png',
            'A002304-01-10-1901-NA-CT-ABD-AND-PELVIS-WITH-IV-CONT-76655-2',
            7,
            'A002304',
        ),
        ('study_0255-0012.png', 'study_0255', 12, 'study_0255'),
        ('phantom1-0-0012-0003.png', 'phantom1-0-0012', 3, 'phantom1-0-0012'),
        ('cohort/CP_12_3456_0010.png', 'cohort/CP_12_3456', 10, 'CP_12'),
    ],
)
def test_names_of_every_source(file, scan, index, patient):
    assert lists.parse_scan(file) == (scan, index)
    assert lists.parse_patient(scan) == patient


@pytest.mark.parametrize('file', ['scan.png', '0001.png', '_0001.png/x.png', 'CP_1_11_0001', 'a/_0001.png', ''])
def test_name_without_a_slice_number(file):
    with pytest.raises(ValueError, match='slice number'):
        lists.parse_scan(file)


@pytest.mark.parametrize(
    ('line', 'reason'),
    [
        ('a_0001.png 1 0 0 9', '5 fields instead of 6'),
        ('a b_0001.png 1 0 0 9 9', '7 fields instead of 6'),
        ('a_0001.png 3 0 0 9 9', "class '3' is not 0, 1 or 2"),
        ('a_0001.png -1 0 0 9 9', "class '-1' is not"),
        ('a_0001.png 1.0 0 0 9 9', "class '1.0' is not"),
        ('a_0001.png 1 0 0 9.5 9', "box value '9.5' is not a whole number"),
        ('a_0001.png 1 0 0 1_0 9', "box value '1_0' is not a whole number"),
        ('a_0001.png 1 0 0 nan 9', "box value 'nan' is not a whole number"),
        ('a_0001.png 1 5 0 5 9', 'the box 5 0 5 9 is empty'),
        ('a_0001.png 1 0 9 9 3', 'the box 0 9 9 3 is empty'),
        ('a_0001.png 1 -9 0 0 9', 'the box -9 0 0 9 is empty'),
        ('../a_0001.png 1 0 0 9 9', 'not a plain path inside'),
        ('b/../../a_0001.png 1 0 0 9 9', 'not a plain path inside'),
        ('b//a_0001.png 1 0 0 9 9', 'not a plain path inside'),
        ('/etc/a_0001.png 1 0 0 9 9', 'is absolute'),
        ('C:/a_0001.png 1 0 0 9 9', 'is absolute'),
        ('b\\a_0001.png 1 0 0 9 9', 'has a backslash'),
        ('a\0b_0001.png 1 0 0 9 9', 'not printable UTF-8'),
        ('a\x1b[31m_0001.png 1 0 0 9 9', 'not printable UTF-8'),
        ('slice.png 1 0 0 9 9', 'does not end in a slice number'),
        ('', '0 fields instead of 6'),
    ],
)
def test_bad_line(tmp_path, line, reason):
    message = get_error(write_lists(tmp_path, val=[GOOD['val'][0], line, GOOD['val'][1]]))
    assert 'val_COVIDx_CT-2A.txt:2:' in message
    assert reason in message


def test_undecodable_bytes_are_named_with_their_line(tmp_path):
    message = get_error(write_lists(tmp_path, val=b'CP_4_14_0003.png 1 0 0 9 9\nCP_\xff_14_0004.png 1 0 0 9 9\n'))
    assert 'val_COVIDx_CT-2A.txt:2: file name' in message
    assert message.isascii()


def test_duplicates_within_and_across_lists(tmp_path):
    message = get_error(write_lists(tmp_path, val=[GOOD['val'][0]] * 2, test=[GOOD['train'][1]]))
    assert "val_COVIDx_CT-2A.txt:2: 'CP_4_14_0003.png' is already listed in val_COVIDx_CT-2A.txt:1" in message
    assert "test_COVIDx_CT-2A.txt:1: 'NCP_2_12_0000.png' is already listed in train_COVIDx_CT-2A.txt:2" in message
    assert '(2 in all)' in message


def test_faults_of_all_lists_come_in_one_error(tmp_path):
    bad = [f'Normal_1_{i}_0000.png 7 0 0 9 9' for i in range(30)]
    message = get_error(write_lists(tmp_path, train=bad, val=b' \n', test=[*GOOD['test'], 'x']))
    assert message.count('train_COVIDx_CT-2A.txt:') == 20
    assert '(32 in all, the first 20 shown)' in message
    message = get_error(write_lists(tmp_path, train=bad[:2], val=b' \n', test=[*GOOD['test'], 'x']))
    assert 'val_COVIDx_CT-2A.txt: the list is empty' in message
    assert 'test_COVIDx_CT-2A.txt:2: 1 fields' in message


def test_missing_list_and_absent_class(tmp_path):
    write_lists(tmp_path, train=GOOD['train'][:1])
    (tmp_path / 'test_COVIDx_CT-2A.txt').unlink()
    message = get_error(tmp_path)
    assert 'test_COVIDx_CT-2A.txt: the list is missing' in message
    assert 'train_COVIDx_CT-2A.txt: no row of normal or covid19' in message


@pytest.mark.parametrize('version', ['1', '2A', '3A'])
def test_version(tmp_path, version):
    assert lists.find_version(write_lists(tmp_path, version)) == version
    assert len(lists.read_lists(str(tmp_path))['train']) == 3


def test_wrong_directories(tmp_path):
    assert 'there is no directory' in get_error(tmp_path / 'absent')
    assert 'holds no COVIDx CT lists' in get_error(tmp_path)
    (tmp_path / 'file').touch()
    assert 'cannot be listed' in get_error(tmp_path / 'file')
    write_lists(tmp_path, '2A')
    write_lists(tmp_path, '3A')
    assert 'several COVIDx CT versions (2A, 3A)' in get_error(tmp_path)


def test_image_folder(tmp_path):
    with pytest.raises(UserError, match='expected 3A_images or images'):
        lists.find_images(str(tmp_path), '3A')
    (tmp_path / 'images').mkdir()
    assert lists.find_images(str(tmp_path), '3A') == str(tmp_path / 'images')
    (tmp_path / '3A_images').mkdir()
    assert lists.find_images(str(tmp_path), '3A') == str(tmp_path / '3A_images')


def test_fingerprint_follows_rows_order_and_settings(tmp_path):
    rows = lists.read_lists(write_lists(tmp_path))
    fingerprint = lists.compute_fingerprint(rows, image_size=64)
    assert len(fingerprint) == 64
    assert fingerprint == lists.compute_fingerprint(lists.read_lists(str(tmp_path)), image_size=64)
    changed = rows['val'][0]._replace(box=(0, 1, 9, 9))
    others = [
        lists.compute_fingerprint(rows, image_size=65),
        lists.compute_fingerprint({**rows, 'val': rows['val'][::-1]}, image_size=64),
        lists.compute_fingerprint({**rows, 'val': [changed, rows['val'][1]]}, image_size=64),
        lists.compute_fingerprint({**rows, 'val': rows['test'], 'test': rows['val']}, image_size=64),
    ]
    assert len({fingerprint, *others}) == 5


def test_metadata(tmp_path):
    path = tmp_path / 'metadata.csv'
    path.write_bytes(b'\xef\xbb\xbfpatient id,sex\r\nCP_1,F\r\n"CP_2",\r\nCP_1,F\r\n')
    assert lists.read_metadata(str(path))['CP_1'] == {'patient id': 'CP_1', 'sex': 'F'}
    for text, reason in [
        (b'patient id,sex\nCP_1,F\nCP_1,M\n', ':3: .*other columns'),
        (b'id,sex\n', 'no column'),
        (b'', 'no column'),
        (b'patient id\n\xff\n', 'not a CSV'),
    ]:
        path.write_bytes(text)
        with pytest.raises(UserError, match=reason):
            lists.read_metadata(str(path))
    with pytest.raises(UserError, match='cannot be read'):
        lists.read_metadata(str(tmp_path / 'absent.csv'))


def test_public_validation_list(real_data):
    folder = real_data / 'covidx_lists'
    rows = lists.read_list(str(folder / 'val_COVIDx_CT-2A.txt'))
    assert len(rows) == 25_486
    assert collections.Counter(row.label for row in rows) == {0: 11_842, 1: 7_400, 2: 6_244}
    scans = [row.scan for row in rows]
    assert len(set(scans)) == 682
    assert 1 + sum(a != b for a, b in itertools.pairwise(scans)) == 682  # contiguous
    assert {row.patient for row in rows} <= set(lists.read_metadata(str(folder / 'metadata.csv')))
