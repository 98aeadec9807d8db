import contextlib
import io
import json
import pickle
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
from covidjax.data.scan.volume import read_volume
from covidjax.errors import UserError
from covidjax.evaluation.burden import measure_burden
from covidjax.experiment.runs import Member
from covidjax.predict import archive, dicom_images, dicom_report, dicom_results, scan, tasks
from covidjax.predict.dicom_codes import TERMS
from covidjax.predict.prepare import PreparedScan
from covidjax.report.burden import LesionPrediction, Outlined, ShownSlice
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
    'PixelSpacing': [5, 5],
}
MAKER = dicom_results.describe_maker(RESULTS, '0123456789ab')
KINDS = {
    'classes': {'report', 'map', 'page'},
    'lesions': {'report', 'segments', 'page'},
    'both': {'report', 'map', 'segments', 'page'},
    'refusal': {'report'},
}
FILES = [(kind, name) for kind, names in KINDS.items() for name in sorted(names)]


def outline(volume):
    """Outlines the patch of -300 HU in each slice as a lesion, and that of every other slice as consolidation."""
    patch = HU == -300
    probabilities = np.stack([HU < -300, patch, patch & (np.arange(20) % 2 == 0)[:, None, None]], -1).astype(np.float16)
    burden = measure_burden(probabilities, volume.lungs, volume.depths_mm, threshold=0.5)
    about = {'model': 'outliner', 'digest': 'd' * 64, 'trained_on_phantoms': False}
    grey = apply_window(HU)
    shown = [ShownSlice(t + 1, grey[t], patch[t].astype(np.uint8) * 2) for t in (0, 5, 9)]
    return Outlined(about | burden.to_json(), burden, probabilities, np.zeros(2), shown)


@pytest.fixture(scope='module')
def run():
    config = att2.get_config()
    config.data.image_size = 32
    variables = draw_variables(EXTRACTOR, np.zeros((1, 32, 32, 1), np.float32), train=False)
    rules = RULES | {'scans': {'rule': 'top-3', **RULES}}
    return scan.Run(config, RESULTS, rules, (Member(EXTRACTOR, variables, None, None),))


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    return write_series(tmp_path_factory.mktemp('scan') / 'source', HU, **HEADER)


@pytest.fixture(scope='module')
def volume(source):
    return read_volume(source, with_lungs=True)


@pytest.fixture(scope='module')
def predictions(run, source, volume):
    """Predictions by kind: of a classifier, of a lesion model, of both together."""
    classes = scan.predict_scan(run, volume, {}, force=False, path=source)
    outlined = outline(volume)
    alone = {
        **{name: classes.summary[name] for name in ('input', 'notice', 'trained_on')},
        'forced': [],
        'warnings': ['no verdict'],
        'lesions': outlined.summary,
    }
    sick = {'probability': 0.9, 'classifier_alone': {'normal': 0.5}, 'disagreement': 'lesions and classifier disagree'}
    both = classes._replace(summary=classes.summary | {'lesions': outlined.summary, 'sick': sick}, outlined=outlined)
    return {'classes': classes, 'lesions': LesionPrediction(alone, classes.boxes, outlined), 'both': both}


@pytest.fixture(scope='module')
def files(source, volume, predictions):
    """DICOM files by kind of the prediction and by name."""
    headers = dicom_results.read_headers(source, None)
    found = {
        kind: dicom_results.create_results(headers, volume, prediction, RESULTS, MAKER)
        for kind, prediction in predictions.items()
    }
    return found | {'refusal': dicom_results.create_refusal(headers, 'too dark; too small (--force goes on)', MAKER)}


@pytest.fixture(scope='module')
def objects(files):
    return {
        kind: {name: pydicom.dcmread(io.BytesIO(data)) for name, data in of_kind.items()}
        for kind, of_kind in files.items()
    }


def get_uids(source, numbers):
    """Returns the SOP Instance UIDs of slices, numbered from the head."""
    headers = sorted(map(pydicom.dcmread, source.iterdir()), key=lambda header: -header.ImagePositionPatient[2])
    return [headers[number - 1].SOPInstanceUID for number in numbers]


def read_text(report):
    return '\n'.join(element.value for element in report.iterall() if element.keyword == 'TextValue')


def test_objects_belong_to_the_patient_and_the_study(objects):
    assert {kind: set(of_kind) for kind, of_kind in objects.items()} == KINDS
    datasets = [dataset for of_kind in objects.values() for dataset in of_kind.values()]
    for dataset in datasets:
        for name in ('PatientName', 'PatientID', 'PatientBirthDate', 'AccessionNumber', 'ReferringPhysicianName'):
            assert dataset[name].value == IDENTITY[name]
        assert (dataset.StudyInstanceUID, dataset.StudyID, dataset.StudyDate) == (UID, '7', '20260101')
        assert 'research use only' in dataset.SeriesDescription
        assert dataset.SoftwareVersions
        assert dataset.DeviceSerialNumber == '0123456789ab'
    assert len({dataset.SeriesInstanceUID for dataset in datasets} | {f'{UID}.2'}) == len(datasets) + 1


class TestReport:
    def test_probabilities(self, source, objects, predictions):
        report = highdicom.sr.ComprehensiveSR.from_dataset(objects['classes']['report'])
        summary = predictions['classes'].summary
        groups = report.content.get_image_measurement_groups()
        assert len(groups) == 3
        for group, (name, share) in zip(groups, summary['probabilities'].items(), strict=True):
            assert group.finding_type.value == TERMS[name].value
            [probability] = group.get_measurements()
            assert probability.value == pytest.approx(100 * share, abs=0.005)
            assert probability.unit.meaning == 'Percent'
            found = [image.referenced_sop_instance_uid for image in group.source_images]
            assert found == get_uids(source, summary['rests_on'])
        [site] = groups[1].finding_sites
        assert site.value.EquivalentCodeSequence[0].CodeValue == 'RID1301'
        assert groups[1].finding_type.EquivalentCodeSequence[0].CodeValue == 'RID5350'
        text = read_text(objects['classes']['report'])
        for words in (
            dicom_report.USE,
            'The model was trained on not patients',
            'Uncertain: the 90% conformal set holds',
            'run 0123456789ab',
            'too few',
        ):
            assert words in text
        [study] = report.CurrentRequestedProcedureEvidenceSequence
        assert study.StudyInstanceUID == UID
        assert [len(series.ReferencedSOPSequence) for series in study.ReferencedSeriesSequence] == [20]

    @pytest.mark.parametrize('kind', ['lesions', 'both'])
    def test_volumes_refer_to_segments(self, source, objects, predictions, kind):
        report = highdicom.sr.ComprehensiveSR.from_dataset(objects[kind]['report'])
        lesions, segments = predictions[kind].summary['lesions'], objects[kind]['segments']
        groups = report.content.get_volumetric_roi_measurement_groups()
        assert [group.finding_type.value for group in groups] == ['39607008', '52988006', '95436008']
        for number, group in enumerate(groups, 1):
            assert group.reference_type.meaning == 'Referenced Segment'
            [segment] = group.referenced_segment.referenced_segment_numbers
            assert (segment, group.tracking_uid) == (number, segments.SegmentSequence[number - 1].TrackingUID)
        values = [
            {one.name.meaning: (one.value, one.unit.value) for one in group.get_measurements()} for group in groups
        ]
        # A voxel has 5 x 5 x 5 mm.
        assert values[1]['Volume'] == (pytest.approx((HU == -300).sum() * 0.125, abs=0.01), 'ml')
        assert values[1]['Volume Ratio'] == (pytest.approx(lesions['lesions_percent'], abs=0.01), '%')
        assert values[1]['Attenuation Coefficient'] == (pytest.approx(-300, abs=0.01), "[hnsf'U]")
        assert values[2]['Volume'] == (pytest.approx((HU[::2] == -300).sum() * 0.125, abs=0.01), 'ml')
        assert values[0] == {'Volume': (pytest.approx(lesions['lungs_ml'], abs=0.01), 'ml')}
        infected = report.content.get_image_measurement_groups()[-1]
        found = [image.referenced_sop_instance_uid for image in infected.source_images]
        assert found == get_uids(source, lesions['infected'])
        assert len(found) > 10
        text = read_text(objects[kind]['report'])
        assert 'weights dddddddddddd' in text
        assert 'Lesions in' in text
        assert ('Lesions and classifier disagree.' in text) == (kind == 'both')
        [study] = report.CurrentRequestedProcedureEvidenceSequence
        counts = {len(series.ReferencedSOPSequence) for series in study.ReferencedSeriesSequence}
        assert counts == {20, 1}

    def test_a_refusal(self, objects):
        report = highdicom.sr.ComprehensiveSR.from_dataset(objects['refusal']['report'])
        assert report.content.get_image_measurement_groups() == []
        text = read_text(objects['refusal']['report'])
        assert 'Not predicted: the scan was refused.\nToo dark; too small.' in text
        assert '--force' not in text
        assert '373068000' in [item.value for item in report.iterall() if item.keyword == 'CodeValue']

    def test_runs_of_slices(self):
        assert dicom_report.format_runs([3, 5, 6, 7, 9, 10]) == '3, 5-7, 9-10'
        assert dicom_report.format_runs([]) == ''


def test_doubts_and_refusals_of_the_command(run, tmp_path):
    solid = np.where(HU < -950, HU, np.int16(40))
    source = write_series(tmp_path / 'source', solid, **HEADER)
    with pytest.raises(UserError, match='air the size of lungs'):
        scan.predict_one(run, source, tmp_path / 'out', series=None, force=False, dicom=True)
    assert [path.name for path in (tmp_path / 'out').rglob('*')] == ['dicom', 'report.dcm']
    text = read_text(pydicom.dcmread(tmp_path / 'out/dicom/report.dcm'))
    assert 'Not predicted: the scan was refused.\nAir the size of lungs' in text
    assert '--force' not in text
    assert str(tmp_path) not in text
    scan.predict_one(run, source, tmp_path / 'out', series=None, force=True, dicom=True)
    text = read_text(pydicom.dcmread(tmp_path / 'out/dicom/report.dcm'))
    assert 'Predicted in spite of: air the size of lungs' in text
    assert sorted(path.name for path in (tmp_path / 'out/dicom').iterdir()) == ['map.dcm', 'page.dcm', 'report.dcm']
    with pytest.raises(UserError):
        scan.predict_one(run, source, tmp_path / 'out', series=None, force=False, dicom=True)
    assert [path.name for path in (tmp_path / 'out/dicom').iterdir()] == ['report.dcm']


def test_a_refused_scan_that_nothing_can_refer_to_gets_no_report(run, tmp_path):
    source = write_images(tmp_path / 'source', np.full((3, 64, 64), 7, np.uint8))
    with pytest.raises(UserError, match='nearly of one grey'):
        scan.predict_one(run, source, tmp_path / 'out', series=None, force=False, dicom=True)
    assert not (tmp_path / 'out').exists()


TURNED = {'ImageOrientationPatient': [0, 1, 0, 1, 0, 0]}


@pytest.mark.parametrize('options', [{}, {'flip': True}, TURNED], ids=['plain', 'flipped', 'turned'])
class TestGeometry:
    """The stored slices are HU, HU turned by 180 degrees, or HU with rows and columns exchanged in the patient."""

    @pytest.fixture
    def scan_there(self, tmp_path, options):
        stored = HU.transpose(0, 2, 1) if options == TURNED else HU
        source = write_series(tmp_path / 'source', stored, **HEADER | options)
        volume = read_volume(source, with_lungs=True)
        np.testing.assert_array_equal(volume.slices[3], apply_window(HU[3]))
        return dicom_results.check_headers(dicom_results.read_headers(source, None)), volume, source

    def test_segments_lie_on_their_slices(self, scan_there):
        headers, volume, source = scan_there
        made = dicom_images.create_segments(headers, volume, outline(volume), MAKER)
        segments = highdicom.seg.Segmentation.from_dataset(made)
        files = {one.SOPInstanceUID: one for one in map(pydicom.dcmread, source.iterdir())}
        found = segments.get_pixels_by_source_instance(
            list(files), segment_numbers=[1, 2, 3], assert_missing_frames_are_empty=True
        )
        for number, (lungs, lesion, dense) in enumerate(found.transpose(0, 3, 1, 2)):
            one = list(files.values())[number]
            hu = one.pixel_array.astype(int) + int(one.RescaleIntercept)
            np.testing.assert_array_equal(lesion, hu == -300)
            is_dense = round(-one.ImagePositionPatient[2] / 5) % 2 == 0
            np.testing.assert_array_equal(dense, lesion * is_dense)
            assert lungs[lesion > 0].all()
            assert (hu[lungs > 0] < -200).mean() > 0.97
            assert lungs[(hu < -700) & (hu > -860)].mean() > 0.97
        for group in made.PerFrameFunctionalGroupsSequence:
            uid = group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
            assert group.PlanePositionSequence[0].ImagePositionPatient == files[uid].ImagePositionPatient
        shared = made.SharedFunctionalGroupsSequence[0]
        assert shared.PlaneOrientationSequence[0].ImageOrientationPatient == one.ImageOrientationPatient
        assert shared.PixelMeasuresSequence[0].PixelSpacing == [5, 5]
        types = [segments.get_segment_description(number).segmented_property_type for number in (1, 2, 3)]
        assert [kind.value for kind in types] == ['39607008', '52988006', '95436008']
        [algorithm] = made.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence
        assert algorithm.AlgorithmName == 'covidjax outliner'
        assert 'weights=dddddddddddd' in algorithm.AlgorithmParameters

    def test_the_map_lies_on_its_slices(self, predictions, scan_there, options):
        headers, volume, _ = scan_there
        prediction = predictions['classes']  # the slices are the same when upright
        numbers = prediction.summary['rests_on']
        maps = dicom_images.compute_top_maps(prediction, 'evidence, predicted class')
        dataset = dicom_images.create_map(headers, volume, prediction, maps, 'a map', MAKER)
        mapping = dataset.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence[0]
        groups = dataset.PerFrameFunctionalGroupsSequence
        positions = [group.PlanePositionSequence[0].ImagePositionPatient[2] for group in groups]
        assert sorted(positions) == sorted(-5.0 * (number - 1) for number in numbers)
        for frame, position in zip(dataset.pixel_array * mapping.RealWorldValueSlope, positions, strict=True):
            number = round(-position / 5) + 1
            box = prediction.boxes[number - 1]
            upright = frame[::-1, ::-1] if 'flip' in options else frame.T if options else frame
            inside = upright[box[1] : box[3], box[0] : box[2]]
            assert upright.sum() == pytest.approx(inside.sum())
            # The highest value of a map lies where that of the crop does, in shares of the crop.
            expected = np.array(np.unravel_index(maps[numbers.index(number)].argmax(), (32, 32))) / 32
            place = np.array(np.unravel_index(inside.argmax(), inside.shape)) / inside.shape
            assert np.abs(expected - place).max() < 0.06


def test_outlines_reach_the_process_of_an_archive_that_writes_them(source, volume, predictions, files):
    prediction = predictions['both']
    light = volume._replace(slices=volume.slices[10:11])
    prepared = PreparedScan(light, prediction.boxes, prediction.used, prediction.images, [], [])
    task = tasks.Prepared('a', '4', prepared, {}, dicom_results.read_headers(source, None))
    for with_outlines in (True, False):
        sent = pickle.loads(pickle.dumps(archive.lighten(task, prediction, with_outlines=with_outlines)))
        assert (sent[0].scan.volume.lungs is not None) == with_outlines
        if with_outlines:
            finished = tasks.finish_scan(*sent, RESULTS, 'none', MAKER)
            segments = pydicom.dcmread(io.BytesIO(finished.dicom['segments']))
            assert segments.PixelData == pydicom.dcmread(io.BytesIO(files['both']['segments'])).PixelData


def test_no_lungs_no_segments(source, volume, predictions):
    prediction = predictions['lesions']
    nothing = np.zeros_like(prediction.outlined.probabilities)
    grid = volume.lungs._replace(lungs_txhxw=np.zeros_like(volume.lungs.lungs_txhxw))
    burden = measure_burden(nothing, grid, volume.depths_mm, threshold=0.5)
    outlined = prediction.outlined._replace(
        burden=burden, probabilities=nothing, summary=prediction.outlined.summary | burden.to_json()
    )
    prediction = prediction._replace(outlined=outlined, summary=prediction.summary | {'lesions': outlined.summary})
    headers = dicom_results.read_headers(source, None)
    found = dicom_results.create_results(headers, volume._replace(lungs=grid), prediction, RESULTS, MAKER)
    assert found.keys() == {'report', 'page'}
    assert 'No lungs found' in read_text(pydicom.dcmread(io.BytesIO(found['report'])))


def test_a_run_whose_maps_are_refuted_writes_no_map(source, volume, predictions):
    refuted = RESULTS | {'explanations': {'leading_map': {'name': None}}}
    headers = dicom_results.read_headers(source, None)
    found = dicom_results.create_results(headers, volume, predictions['classes'], refuted, MAKER)
    assert found.keys() == {'report', 'page'}


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'SOPInstanceUID': ''}, 'no SOP Instance UIDs'),
        ({'SOPInstanceUID': UID}, 'or one twice'),
        ({'SOPClassUID': '1.2'}, 'not single CT images'),
        ({'StudyInstanceUID': ''}, 'not single CT images of a study'),
    ],
)
def test_slices_that_nothing_can_refer_to(source, changes, message):
    headers = dicom_results.read_headers(source, None)
    for header in headers:
        for name, value in changes.items():
            setattr(header, name, value)
    with pytest.raises(UserError, match=message):
        dicom_results.create_refusal(headers, 'any', MAKER)


def test_images_have_no_headers(tmp_path):
    source = write_images(tmp_path / 'source', apply_window(HU[:3]))
    with pytest.raises(UserError, match='no DICOM slice in it'):
        dicom_results.read_headers(source, None)


def test_headers_with_gaps_and_no_messages_of_libraries(volume, predictions, tmp_path, caplog, capfd, recwarn):
    names = ('PatientName', 'PatientID', 'PatientBirthDate', 'AccessionNumber', 'StudyDate')
    header = HEADER | dict.fromkeys(names[1:-1], '') | {'PatientName': 'no carets and = wrong'}
    header.pop('FrameOfReferenceUID')
    headers = dicom_results.read_headers(write_series(tmp_path / 'source', HU, **header), None)
    found = dicom_results.create_results(headers, volume, predictions['both'], RESULTS, MAKER)
    assert found.keys() == {'report', 'page'}
    everything = caplog.text + ''.join(capfd.readouterr()) + ' '.join(str(warning.message) for warning in recwarn)
    assert 'carets' not in everything
    assert 'Secret' not in everything


@pytest.mark.skipif(shutil.which('dciodvfy') is None, reason='no dciodvfy, of the Debian package dicom3tools')
@pytest.mark.parametrize(('kind', 'name'), FILES)
def test_a_validator_finds_no_error(files, tmp_path, kind, name):
    (tmp_path / 'file.dcm').write_bytes(files[kind][name])
    done = subprocess.run(['dciodvfy', tmp_path / 'file.dcm'], capture_output=True, text=True)
    lines = (done.stdout + done.stderr).splitlines()
    assert [line for line in lines if line.startswith('Error')] == []
    classes = {'report': 'ComprehensiveSR', 'map': 'ParametricMap', 'segments': 'Segmentation', 'page': 'SCImage'}
    assert classes[name] in lines


@contextlib.contextmanager
def start_orthanc(folder):
    """Yields the address of an Orthanc on this machine, and its DICOM port."""
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
            yield address, ports[1]
        finally:
            process.terminate()


def get(address, data=None):
    with urllib.request.urlopen(address, data) as answer:
        return answer.read()


@pytest.fixture(scope='module')
def orthanc(tmp_path_factory):
    if shutil.which('Orthanc') is None:
        pytest.skip('no Orthanc, of the Debian package orthanc')
    with start_orthanc(tmp_path_factory.mktemp('orthanc')) as found:
        yield found


@pytest.mark.skipif(shutil.which('curl') is None, reason='no curl')
def test_the_commands_of_the_docs_give_the_results_back_to_orthanc(run, source, orthanc, tmp_path):
    [code] = re.findall(r'```sh\n(.*?)```', (ROOT / 'docs/pacs.md').read_text(), re.DOTALL)
    fetch, give = code.split('covidjax predict --workdir=/tmp/run --input=study.zip --output=out --dicom\n')
    address, _ = orthanc

    def call(lines):
        lines = lines.replace('http://127.0.0.1:8042', address)
        subprocess.run(['bash', '-eu', '-c', lines], cwd=tmp_path, check=True, timeout=120)

    for path in source.iterdir():
        get(f'{address}/instances', path.read_bytes())
    call(fetch)
    scan.predict_one(run, tmp_path / 'study.zip', tmp_path / 'out', series=None, force=False, dicom=True)
    call('orthanc=http://127.0.0.1:8042\n' + give)
    [study] = json.loads(get(f'{address}/studies?expand'))
    assert study['PatientMainDicomTags']['PatientName'] == IDENTITY['PatientName']
    series = json.loads(get(f'{address}/series?expand'))
    assert len(study['Series']) == 4
    assert sorted(len(one['Instances']) for one in series) == [1, 1, 1, 20]
    for name in KINDS['classes']:
        written = pydicom.dcmread(tmp_path / f'out/dicom/{name}.dcm')
        assert fetch_back(address, written) == written


def fetch_back(address, dataset):
    """Returns what an Orthanc holds of a dataset."""
    [name] = json.loads(get(f'{address}/tools/lookup', dataset.SOPInstanceUID.encode()))
    return pydicom.dcmread(io.BytesIO(get(f'{address}/instances/{name["ID"]}/file')))


def test_every_kind_is_stored_by_c_store(objects, orthanc):
    pynetdicom = pytest.importorskip('pynetdicom', reason='C-STORE needs pynetdicom')
    address, port = orthanc
    sent = [dataset for of_kind in objects.values() for dataset in of_kind.values()]
    entity = pynetdicom.AE()
    for uid in {dataset.SOPClassUID for dataset in sent}:
        entity.add_requested_context(uid)
    association = entity.associate('127.0.0.1', port, ae_title='ORTHANC')
    assert association.is_established
    assert [association.send_c_store(dataset).Status for dataset in sent] == [0] * len(sent)
    association.release()
    for dataset in sent:
        assert fetch_back(address, dataset) == dataset
