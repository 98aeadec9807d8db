"""Applies a finished run to other data with labels: the lists of a raw directory, or scans that a CSV file lists."""

import bisect
import csv
import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from covidjax.audit.overlap import measure_listed, measure_prepared
from covidjax.data import covidx_ct, lists, sequences
from covidjax.data.lists import CLASSES
from covidjax.data.scan.volume import Volume, read_volume
from covidjax.errors import UserError, join_faults
from covidjax.evaluation.baselines import compute_thumbnails
from covidjax.evaluation.external import Side
from covidjax.evaluation.outputs import SliceOutputs
from covidjax.evaluation.sick import Found, join_logits
from covidjax.evaluation.subgroups import COLUMNS, name_group, name_slices, name_thickness, read_columns
from covidjax.experiment.external import (
    Inside,
    Outside,
    choose_name,
    describe_lists,
    get_rules,
    load_inside,
    refuse_shared_patients,
    refuse_shared_pictures,
    write_external,
)
from covidjax.experiment.runs import Run, average_outputs, compute_mean_novelty, compute_member_outputs, load_run
from covidjax.experiment.sick import compute_scan_sick, compute_slice_sick, measure_split
from covidjax.experiment.workdir import lock_workdir
from covidjax.files import report_full_disk
from covidjax.predict.prepare import prepare_scan
from covidjax.predict.scan import classify_sequence, conclude, create_recipe
from covidjax.predict.tasks import describe_error
from covidjax.progress import open_progress, track

log = logging.getLogger(__name__)

LABELS = 'labels.csv'
_AT_ONCE = 256  # slices read before the model runs
_SPELT = {**{name: i for i, name in enumerate(CLASSES)}, **{str(i): i for i in range(len(CLASSES))}, 'covid-19': 2}


def evaluate_external(workdir: Path, path: Path, split: str) -> dict[str, Any]:
    """Tests the best model of a run, with its rules unchanged, on other data; writes external/<name>/ in the workdir.

    Args:
      workdir: of a finished run.
      path: a raw directory with one to three lists, a folder with labels.csv, or a CSV file like it (see
        `read_labels`).
      split: of lists, 'test' or 'all' that there are.

    Returns:
      The content of results.json.

    Raises:
      UserError: the run or the data are no good, or they share patients or pictures.
    """
    labels = _find_labels(path)
    run = load_run(workdir)
    with lock_workdir(workdir), report_full_disk(workdir):
        if labels is None:
            splits = _choose_lists(path, split)
            inside = load_inside(run.config, workdir)
            outside = score_lists(run, workdir, inside, path, split, splits)
        else:
            entries = read_labels(labels)
            inside = load_inside(run.config, workdir)
            outside = score_scans(run, workdir, inside, path, entries)
        return write_external(run, workdir, inside, outside)


def _find_labels(path: Path) -> Path | None:
    """Returns the CSV file of labels, or None for a raw directory."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f'--data={path}: no such folder or CSV file')
    has_labels = (path / LABELS).is_file()
    has_lists = any(path.glob('*_COVIDx_CT-*.txt'))
    if has_labels and has_lists:
        raise UserError(f'--data={path} has lists and {LABELS}: name the CSV file to test its scans')
    if not (has_labels or has_lists):
        raise UserError(f'--data={path} has neither lists ({lists.get_list_name("test", "2A")}) nor {LABELS}')
    return path / LABELS if has_labels else None


# ---------------------------------------------------------------------------------------------------------------------
# Lists


class _Joined:
    """Records of several splits, one after the other."""

    def __init__(self, sources: Sequence[Sequence[dict]]):
        self._sources = sources
        self._ends = list(itertools.accumulate(map(len, sources)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict:
        place = bisect.bisect_right(self._ends, index)
        return self._sources[place][index - (self._ends[place - 1] if place else 0)]


def _choose_lists(path: Path, split: str) -> tuple[str, ...]:
    found = lists.find_splits(str(path))
    if split == 'all':
        return found
    if 'test' not in found:
        raise UserError(f'{path} has no test list, only {", ".join(found)}: pass --split=all to test on these')
    return ('test',)


def score_lists(run: Run, workdir: Path, inside: Inside, path: Path, split: str, splits: Sequence[str]) -> Outside:
    """Prepares lists as the run wants them and scores them; unreadable images are left out and listed.

    Raises:
      UserError: bad lists, no scan that is long enough, or patients or pictures that the run's data have too.
    """
    settings = run.config.data
    data = covidx_ct.prepare(
        str(path),
        image_size=settings.image_size,
        region=settings.region,
        prepared_dir=settings.prepared_dir,
        skip_bad=True,
        splits=splits,
        for_training=False,
    )
    rows, source = list(itertools.chain(*data.rows.values())), _Joined(list(data.sources.values()))
    refuse_shared_patients(inside, workdir, [row.patient for row in rows], path)
    if inside.data is not None:
        pictures = measure_listed(data.rows, Path(lists.find_images(str(path), data.version)))
        refuse_shared_pictures(inside, workdir, pictures, path, prepared=False)
    left_out = [{'name': file, 'reason': reason} for file, reason in data.dropped]
    whole = sequences.group_scans(rows)
    thumbnails = compute_thumbnails(source, name=path.name)
    if not run.is_scan_run:
        logits, unusual = _score_slices(run, source)
        if run.lesions is not None:
            logits = join_logits(compute_slice_sick(run.sick_rule, _measure(run, data)), logits)
        side = Side(np.array([row.label for row in rows]), logits, [row.patient for row in rows], unusual, [])
        side = side._replace(slice_patients=side.patients)
        scan_of = {record: scan for scan in whole for record in scan.records}
        examples, scans = rows, [scan_of[i] for i in range(len(rows))]
        names = {'file': [r.file for r in rows], 'scan': [r.scan for r in rows], 'slice': [r.slice_index for r in rows]}
    else:
        short = [scan for scan in whole if len(scan.records) < run.min_slices]
        left_out += [
            {'name': scan.scan, 'reason': f'{len(scan.records)} slices, the model needs {run.min_slices}'}
            for scan in short
        ]
        scans = [scan for scan in whole if len(scan.records) >= run.min_slices]
        if not scans:
            raise UserError(f'{path}: no scan has the {run.min_slices} slices that this model needs: use a slice run')
        examples = sequences.thin_scans(scans, run.min_slices)
        side = _score_listed_scans(run, source, examples)
        if run.lesions is not None:
            sick = compute_scan_sick(run.sick_rule, _measure(run, data), scans)
            side = side._replace(logits=join_logits(sick, side.logits))
        thumbnails = np.stack([thumbnails[list(scan.records)].mean(0) for scan in examples])
        names = {'scan': [scan.scan for scan in examples]}
    return Outside(
        name=choose_name(workdir, path, split),
        path=path.resolve(),
        split=split,
        unit='scans' if run.is_scan_run else 'slices',
        side=side,
        names=names,
        groups=read_columns(path, examples, rows),
        thumbnails=thumbnails,
        scans=scans,
        dataset=describe_lists(data, run.config),
        left_out=left_out,
    )


def _score_slices(run: Run, source: _Joined) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns logits [N, K] of all records, and which are unusual."""
    logits, unusual = [], []
    with open_progress('testing', len(source), 'slice') as progress:
        for start in range(0, len(source), _AT_ONCE):
            images = np.stack([source[i]['image'] for i in range(start, min(start + _AT_ONCE, len(source)))])
            outputs = compute_member_outputs(run, images)
            logits.append(average_outputs(run, outputs).logits)
            unusual.append(_find_unusual(run, outputs))
            progress.update(len(images))
    return np.concatenate(logits), _join_flags(unusual)


def _measure(run: Run, data: covidx_ct.Prepared) -> Found:
    """Returns what the lesion model finds in the slices of all lists, one list after the other."""
    by_list = [measure_split(run.lesions, data, split) for split in data.rows]
    return Found(*map(np.concatenate, zip(*by_list, strict=True)))


def _score_listed_scans(run: Run, source: _Joined, scans: Sequence[sequences.Scan]) -> Side:
    logits, unusual, patients = [], [], []
    for scan in track(scans, 'testing', len(scans), 'scan'):
        images = np.stack([source[i]['image'] for i in scan.records])
        outputs = compute_member_outputs(run, images)
        logits.append(classify_sequence(run, outputs)[0])
        unusual.append(_find_unusual(run, outputs))
        patients += [scan.patient] * len(scan.records)
    labels = np.array([scan.label for scan in scans])
    return Side(labels, np.stack(logits), [scan.patient for scan in scans], _join_flags(unusual), patients)


def _find_unusual(run: Run, outputs: tuple[SliceOutputs, ...]) -> np.ndarray | None:
    """Returns which slices are unlike the validation slices, bool [N]; None if the run can't tell."""
    novelty = compute_mean_novelty(run, outputs)
    return None if novelty is None else novelty > 1


def _join_flags(flags: Sequence[np.ndarray | None]) -> np.ndarray | None:
    return None if flags[0] is None else np.concatenate(flags)


# ---------------------------------------------------------------------------------------------------------------------
# Scans


class Labelled(NamedTuple):
    """A scan of labels.csv.

    Attributes:
      path: as it is spelt there.
      file: of the scan, see `volume.read_volume`.
      label: index into `CLASSES`.
      patient: the path if the file does not tell.
      columns: the other columns, by name.
    """

    path: str
    file: Path
    label: int
    patient: str
    columns: dict[str, str]


def read_labels(path: Path) -> list[Labelled]:
    """Reads a CSV file of labelled scans.

    Its columns are `path` (relative to the file's folder) and `label` (normal, pneumonia, covid19, or 0, 1, 2), and any
    of `patient`, `sex`, `age`, `country` and `source`.

    Raises:
      UserError: the file is unreadable or empty, lacks a column, or has bad lines (all counted, the first 20 named).
    """
    try:
        with path.open(encoding='utf-8-sig', newline='') as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            rows = [(reader.line_num, row) for row in reader]
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror})') from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f'{path} is not a CSV file in UTF-8 ({error}): save it as one') from error
    missing = [name for name in ('path', 'label') if name not in columns]
    if missing:
        raise UserError(f'{path} has no column {" and no column ".join(missing)}: its first line must name them')
    if not rows:
        raise UserError(f'{path} lists no scan')
    found, faults, seen = [], [], Counter()
    for number, row in rows:
        spelt, label = (row['path'] or '').strip(), (row['label'] or '').strip()
        if not spelt:
            faults.append(f'line {number}: no path')
            continue
        if label.lower() not in _SPELT:
            faults.append(f'line {number}: label {label!r} is not {", ".join(CLASSES)} or 0, 1, 2')
            continue
        file = path.parent / spelt
        seen[file.resolve()] += 1
        if seen[file.resolve()] == 2:
            faults.append(f'line {number}: {spelt} again')
        patient = (row.get('patient') or '').strip() or spelt
        found.append(Labelled(spelt, file, _SPELT[label.lower()], patient, row))
    if faults:
        raise UserError(f'bad lines in {path}, fix them and run again: {join_faults(faults)}')
    return found


def score_scans(run: Run, workdir: Path, inside: Inside, path: Path, entries: Sequence[Labelled]) -> Outside:
    """Reads and scores scans as `predict` does; those that it would refuse are left out and listed with the reason.

    Raises:
      UserError: no scan can be read, or the run's data have the same patients or pictures.
    """
    rules = get_rules(run, 'scans')
    refuse_shared_patients(inside, workdir, [entry.patient for entry in entries], path)
    recipe, kept, left_out = create_recipe(run), [], []
    probabilities, verdicts, unusual, slice_patients, thumbnails, measured, groups = [], [], [], [], [], [], []
    for entry in track(entries, 'testing', len(entries), 'scan'):
        try:
            volume = read_volume(entry.file, with_lungs=recipe.with_lungs)
            prepared = prepare_scan(volume, recipe, force=False)
        except UserError as error:
            left_out.append({'name': entry.path, 'reason': str(error).removeprefix(f'{entry.file}: ')})
            continue
        except Exception as error:  # a damaged file must not end the test
            left_out.append({'name': entry.path, 'reason': describe_error(error)})
            continue
        prediction = conclude(run, prepared, compute_member_outputs(run, prepared.images[..., np.newaxis]))
        kept.append(entry)
        probabilities.append(list(prediction.summary['probabilities'].values()))
        verdicts.append(prediction.summary['verdict'])
        unusual.append(None if prediction.novelty is None else prediction.novelty > 1)
        slice_patients += [entry.patient] * len(prepared.images)
        names = [f'{entry.path} slice {place + 1}' for place in prepared.used.tolist()]
        measured.append(measure_prepared(zip(names, prepared.images, strict=True)))
        thumbnails.append(measured[-1].thumbnails.reshape(len(names), -1).mean(0) / 255)
        groups.append(_describe_scan(entry, volume, len(prepared.boxes)))
    for one in left_out:
        log.warning('left out: %s: %s', one['name'], one['reason'])
    if not kept:
        raise UserError(f'{path}: no scan of it can be tested: {join_faults([one["reason"] for one in left_out])}')
    pictures = type(measured[0])(
        [name for one in measured for name in one.names],
        [digest for one in measured for digest in one.digests],
        np.concatenate([one.thumbnails for one in measured]),
    )
    refuse_shared_pictures(inside, workdir, pictures, path, prepared=True)
    labels = np.array([entry.label for entry in kept])
    patients = [entry.patient for entry in kept]
    # `conclude` calibrates; the rules expect what it calibrated.
    logits = np.log(np.maximum(probabilities, np.finfo(float).tiny)) * rules['temperature']
    return Outside(
        name=choose_name(workdir, path, 'scans'),
        path=path.resolve(),
        split='scans',
        unit='scans',
        side=Side(labels, logits, patients, _join_flags(unusual), slice_patients),
        names={'path': [entry.path for entry in kept], 'verdict': verdicts},
        groups={name: [of_scan[name] for of_scan in groups] for name in groups[0]},
        thumbnails=np.stack(thumbnails).astype(np.float32),
        scans=None,
        dataset={
            'raw_dir': str(path.resolve()),
            'image_size': recipe.image_size,
            'region': recipe.region,
            'scans': dict(zip(CLASSES, np.bincount(labels, minlength=len(CLASSES)).tolist(), strict=True)),
            'num_dropped': len(left_out),
        },
        left_out=left_out,
    )


def _describe_scan(entry: Labelled, volume: Volume, num_slices: int) -> dict[str, str]:
    """Returns the groups of a scan."""
    thickness = volume.thickness_mm
    if thickness is None and volume.depths_mm is not None and num_slices > 1:
        thickness = float(np.median(np.diff(volume.depths_mm)))
    return {column: name_group(column, entry.columns.get(column)) for column in COLUMNS} | {
        'number of slices': name_slices(num_slices),
        'thickness': name_thickness(thickness),
    }
