import contextlib
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import numpy as np
import pydicom
import pytest

from covidjax.configs import att2
from covidjax.data.preprocess import apply_window
from covidjax.data.scan.sources import open_entries
from covidjax.data.scan.volume import find_frames, read_volume, turn_back, turn_upright
from covidjax.errors import UserError
from covidjax.experiment.runs import Member
from covidjax.predict import dicom_results, scan
from tests.predict.test_scan import EXTRACTOR, RESULTS, RULES
from tests.scan_files import IDENTITY, make_chest, write_images, write_series
from tests.variables import draw_variables

highdicom = pytest.importorskip('highdicom', reason='DICOM results need covidjax[dicom]')

ROOT = Path(__file__).parents[2]
UID = '1.2.826.0.1.3680043.8.498.1'
HU = make_chest()
HEADER = {
    'study': UID,
    'series': f'{UID}.2',
    'FrameOfReferenceUID': f'{UID}.3',
    'StudyDate': '20260101',
    'StudyID': '7',
}


@pytest.fixture(scope='module')
def run():
    config = att2.get_config()
    config.data.image_size = 32
    variables = draw_variables(EXTRACTOR, np.zeros((1, 32, 32, 1), np.float32), train=False)
    rules = RULES | {'scans': {'rule': 'top-3', **RULES}}
    return scan.Run(config, RESULTS, rules, (Member(EXTRACTOR, variables, None, None),))


@pytest.fixture(scope='module')
def made(run, tmp_path_factory):
    """The folder of a scan, and its results, of which dicom/ is a part."""
    folder = tmp_path_factory.mktemp('scan')
    source = write_series(folder / 'source', HU, **HEADER)
    scan.predict_one(run, source, folder / 'out', series=None, force=False, dicom=True)
    return source, folder / 'out'


@pytest.fixture(scope='module')
def objects(made):
    return {path.stem: pydicom.dcmread(path) for path in (made[1] / 'dicom').iterdir()}


@pytest.fixture(scope='module')
def summary(made):
    return json.loads((made[1] / 'prediction.json').read_text())


def get_uids(source, numbers):
    """Returns the SOP Instance UIDs of slices, numbered from the head."""
    headers = sorted(map(pydicom.dcmread, source.iterdir()), key=lambda header: -header.ImagePositionPatient[2])
    return [headers[number - 1].SOPInstanceUID for number in numbers]


def test_objects_belong_to_the_patient_and_the_study(objects):
    assert objects.keys() == {'report', 'map', 'page'}
    for dataset in objects.values():
        for name in ('PatientName', 'PatientID', 'PatientBirthDate', 'AccessionNumber', 'ReferringPhysicianName'):
            assert dataset[name].value == IDENTITY[name]
        assert (dataset.StudyInstanceUID, dataset.StudyID, dataset.StudyDate) == (UID, '7', '20260101')
        assert 'research use only' in dataset.SeriesDescription
        assert dataset.SoftwareVersions
        assert re.fullmatch('[0-9a-f]{12}', dataset.DeviceSerialNumber)
    assert len({dataset.SeriesInstanceUID for dataset in objects.values()} | {f'{UID}.2'}) == 4


def test_nothing_names_the_patient_without_the_flag(run, made, tmp_path):
    scan.predict_one(run, made[0], tmp_path / 'out', series=None, force=False)
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['prediction.html', 'prediction.json']


def test_the_report_holds_the_prediction(made, objects, summary):
    report = highdicom.sr.ComprehensiveSR.from_dataset(objects['report'])
    groups = report.content.get_image_measurement_groups()
    assert len(groups) == 3
    for group, (name, share) in zip(groups, summary['probabilities'].items(), strict=True):
        assert group.finding_type == dicom_results.FINDINGS[name]
        [probability] = group.get_measurements()
        assert probability.value == pytest.approx(100 * share, abs=0.005)
        assert probability.unit.meaning == 'Percent'
        found = [image.referenced_sop_instance_uid for image in group.source_images]
        assert found == get_uids(made[0], summary['rests_on'])
    text = read_text(objects['report'])
    for words in (
        dicom_results.USE,
        'The model was trained on not patients',
        'Uncertain: the 90% conformal set holds',
        f'run {objects["report"].DeviceSerialNumber}',
        'too few',
    ):
        assert words in text
    [study] = report.CurrentRequestedProcedureEvidenceSequence
    assert study.StudyInstanceUID == UID
    assert [len(series.ReferencedSOPSequence) for series in study.ReferencedSeriesSequence] == [20]


def read_text(report):
    return '\n'.join(element.value for element in report.iterall() if element.keyword == 'TextValue')


def test_doubts_are_in_the_report(run, tmp_path):
    solid = np.where(HU < -950, HU, np.int16(40))
    source = write_series(tmp_path / 'source', solid, **HEADER)
    scan.predict_one(run, source, tmp_path / 'out', series=None, force=True, dicom=True)
    report = read_text(pydicom.dcmread(tmp_path / 'out/dicom/report.dcm'))
    assert 'Predicted in spite of: air the size of lungs' in report


@pytest.mark.parametrize('flip', [False, True])
def test_the_map_lies_on_its_slices(run, tmp_path, flip):
    source = write_series(tmp_path / 'source', HU, flip=flip, **HEADER)
    prediction = scan.predict_scan(run, read_volume(source), {}, force=False, path=source)
    scan.write_dicom(run, tmp_path / 'dicom', source, None, prediction)
    dataset = pydicom.dcmread(tmp_path / 'dicom' / 'map.dcm')
    numbers = prediction.summary['rests_on']
    found = (
        dataset.pixel_array
        * dataset.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence[0].RealWorldValueSlope
    )
    maps = dicom_results._compute_top_maps(prediction, 'evidence, predicted class')
    positions = [
        group.PlanePositionSequence[0].ImagePositionPatient[2] for group in dataset.PerFrameFunctionalGroupsSequence
    ]
    assert sorted(positions) == sorted(-5.0 * (number - 1) for number in numbers)
    for frame, position in zip(found, positions, strict=True):
        number = round(-position / 5) + 1
        box = prediction.boxes[number - 1]
        upright = frame[::-1, ::-1] if flip else frame
        inside = upright[box[1] : box[3], box[0] : box[2]]
        assert upright.sum() == pytest.approx(inside.sum())
        # The highest value of a map lies where that of the crop does, in shares of the crop.
        expected = np.array(np.unravel_index(maps[numbers.index(number)].argmax(), (32, 32))) / 32
        place = np.array(np.unravel_index(inside.argmax(), inside.shape)) / inside.shape
        assert np.abs(expected - place).max() < 0.06


def test_turning_back_undoes_turning_upright(tmp_path):
    folder = write_series(tmp_path / 'scan', HU[:3], ImageOrientationPatient=[0, 1, 0, 1, 0, 0])
    with open_entries(folder) as entries:
        frames = find_frames(entries)
    plane = np.arange(12).reshape(3, 4)
    assert not np.array_equal(turn_upright(plane, frames).shape, plane.shape)
    np.testing.assert_array_equal(turn_back(turn_upright(plane, frames), frames), plane)
    np.testing.assert_array_equal(turn_upright(HU[0], frames), read_volume_upright(folder))


def read_volume_upright(folder):
    [first, *_] = read_volume(folder).slices
    assert np.array_equal(first, apply_window(HU[0]).T)
    return HU[0].T


def test_a_run_whose_maps_are_refuted_writes_no_map(run, tmp_path):
    refuted = run._replace(results=RESULTS | {'explanations': {'leading_map': {'name': None}}})
    source = write_series(tmp_path / 'source', HU, **HEADER)
    scan.predict_one(refuted, source, tmp_path / 'out', series=None, force=False, dicom=True)
    assert sorted(path.name for path in (tmp_path / 'out/dicom').iterdir()) == ['page.dcm', 'report.dcm']


@pytest.mark.parametrize(
    ('changes', 'message'),
    [({'SOPInstanceUID': ''}, 'no SOP Instance UIDs'), ({'SOPInstanceUID': UID}, 'or one twice')],
)
def test_slices_that_nothing_can_refer_to(run, tmp_path, changes, message):
    source = write_series(tmp_path / 'source', HU, **HEADER, **changes)
    with pytest.raises(UserError, match=message):
        scan.predict_one(run, source, tmp_path / 'out', series=None, force=False, dicom=True)


def test_images_get_no_dicom(run, tmp_path):
    source = write_images(tmp_path / 'source', apply_window(HU))
    with pytest.raises(UserError, match='no DICOM slice in it'):
        scan.predict_one(run, source, tmp_path / 'out', series=None, force=False, dicom=True)


def test_headers_with_gaps_and_no_messages_of_libraries(run, tmp_path, caplog, capfd, recwarn):
    names = ('PatientName', 'PatientID', 'PatientBirthDate', 'AccessionNumber', 'StudyDate')
    header = HEADER | {'study': UID} | dict.fromkeys(names[1:-1], '') | {'PatientName': 'no carets and = wrong'}
    header.pop('FrameOfReferenceUID')
    source = write_series(tmp_path / 'source', HU, **header)
    scan.predict_one(run, source, tmp_path / 'out', series=None, force=False, dicom=True)
    assert sorted(path.name for path in (tmp_path / 'out/dicom').iterdir()) == ['page.dcm', 'report.dcm']
    everything = caplog.text + ''.join(capfd.readouterr()) + ' '.join(str(warning.message) for warning in recwarn)
    assert 'carets' not in everything
    assert 'Secret' not in everything


@pytest.mark.skipif(shutil.which('dciodvfy') is None, reason='no dciodvfy, of the Debian package dicom3tools')
@pytest.mark.parametrize('name', ['report', 'map', 'page'])
def test_a_validator_finds_no_error(made, name):
    done = subprocess.run(['dciodvfy', made[1] / 'dicom' / f'{name}.dcm'], capture_output=True, text=True)
    lines = (done.stdout + done.stderr).splitlines()
    assert [line for line in lines if line.startswith('Error')] == []
    assert {'report': 'ComprehensiveSR', 'map': 'ParametricMap', 'page': 'SCImage'}[name] in lines


@contextlib.contextmanager
def start_orthanc(folder):
    """Yields the address of an Orthanc on this machine."""
    ports = []
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            opened = stack.enter_context(socket.socket())
            opened.bind(('127.0.0.1', 0))
            ports.append(opened.getsockname()[1])
    config = {
        'StorageDirectory': str(folder / 'storage'),
        'IndexDirectory': str(folder / 'storage'),
        'HttpPort': ports[0],
        'DicomPort': ports[1],
        'RemoteAccessAllowed': False,
        'Plugins': [],
    }
    (folder / 'orthanc.json').write_text(json.dumps(config))
    address = f'http://127.0.0.1:{ports[0]}'
    with subprocess.Popen(
        [shutil.which('Orthanc'), folder / 'orthanc.json'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            for _ in range(300):
                with contextlib.suppress(OSError):
                    get(f'{address}/system')
                    break
                time.sleep(0.1)
            yield address
        finally:
            process.terminate()


def get(address, data=None):
    with urllib.request.urlopen(address, data) as answer:
        return answer.read()


@pytest.mark.skipif(shutil.which('Orthanc') is None, reason='no Orthanc, of the Debian package orthanc')
@pytest.mark.skipif(shutil.which('curl') is None, reason='no curl')
def test_the_commands_of_the_docs_give_the_results_back_to_orthanc(run, made, tmp_path):
    [code] = re.findall(r'```sh\n(.*?)```', (ROOT / 'docs/pacs.md').read_text(), re.DOTALL)
    fetch, give = code.split('covidjax predict --workdir=/tmp/run --input=study.zip --output=out --dicom\n')
    with start_orthanc(tmp_path) as address:

        def call(lines):
            lines = lines.replace('http://127.0.0.1:8042', address)
            subprocess.run(['bash', '-eu', '-c', lines], cwd=tmp_path, check=True, timeout=120)

        for path in made[0].iterdir():
            get(f'{address}/instances', path.read_bytes())
        call(fetch)
        scan.predict_one(run, tmp_path / 'study.zip', tmp_path / 'out', series=None, force=False, dicom=True)
        call('orthanc=http://127.0.0.1:8042\n' + give)
        [study] = json.loads(get(f'{address}/studies?expand'))
        assert study['PatientMainDicomTags']['PatientName'] == IDENTITY['PatientName']
        series = json.loads(get(f'{address}/series?expand'))
        assert len(study['Series']) == 4
        assert sorted(len(one['Instances']) for one in series) == [1, 1, 1, 20]
        [instance] = next(one['Instances'] for one in series if one['MainDicomTags']['Modality'] == 'SR')
        (tmp_path / 'back.dcm').write_bytes(get(f'{address}/instances/{instance}/file'))
        assert pydicom.dcmread(tmp_path / 'back.dcm') == pydicom.dcmread(tmp_path / 'out/dicom/report.dcm')
