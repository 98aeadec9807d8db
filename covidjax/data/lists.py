"""Parser of the COVIDx CT split lists, which have one text line per slice.

A raw directory holds `{train,val,test}_COVIDx_CT-<version>.txt`, version 1, 2A or 3A, and a folder of images. A line is
`file class xmin ymin xmax ymax`. Scan and patient IDs are parsed from the file name.
"""

import csv
import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from covidjax.errors import UserError, join_faults

log = logging.getLogger(__name__)

CLASSES = ('normal', 'pneumonia', 'covid19')  # the index is the label
SPLITS = ('train', 'val', 'test')
VERSIONS = ('1', '2A', '3A')


# A valid line. `_explain_line` finds the error in any other line.
_LINE = re.compile(r'(\S+)\s+([0-2])\s+(-?\d{1,9})\s+(-?\d{1,9})\s+(-?\d{1,9})\s+(-?\d{1,9})', re.ASCII)
_INTEGER = re.compile(r'-?\d{1,9}', re.ASCII)
_SLICE_NAME = re.compile(r'(.*[^/])[-_](?:IM)?(\d{1,9})\.\w+', re.ASCII)

# The part of a scan ID that is the patient ID of metadata.csv. Sources not listed here have one scan per patient.
_PATIENT = re.compile(
    r'^(?:NCP|CP|Normal)_\d+(?=_)'  # CNCB: class_patient_scan
    r'|patient\d+(?=_SR_)'  # COVID-CTset: group_patient_SR_series
    r'|^LIDC-IDRI-\d+(?=-)'  # LIDC-IDRI: patient-series
    r'|^radiopaedia_\d+_\d+(?=_)'  # radiopaedia.org in COVID-19-CT-Seg: case_study_stack
    r'|^radiopaedia-\d+(?=-)'  # radiopaedia.org: case-study-stack
    r'|^volume-covid19-A-\d+(?=_ct$)'  # COVID-19-20 challenge
    r'|^A\d{6}(?=-)',  # Stony Brook: patient-study-series
    re.ASCII,
)


class Row(NamedTuple):
    """One slice of a list.

    Attributes:
      file: image path relative to the image folder, with forward slashes.
      label: index into `CLASSES`.
      box: xmin, ymin, xmax, ymax of the body in pixels, half-open and not empty; may extend beyond the image.
      scan: scan ID, the file name without its last part.
      patient: patient ID as in metadata.csv.
      slice_index: number in the last part of the file name; orders the slices of a scan.
      source: source of the patient by metadata.csv; '' if it gives none.
    """

    file: str
    label: int
    box: tuple[int, int, int, int]
    scan: str
    patient: str
    slice_index: int
    source: str = ''


def parse_scan(file: str) -> tuple[str, int]:
    """Parses the scan ID and slice number from a file name.

    `CP_12_345_0007.png` is slice 7 of `CP_12_345`; the last part may also be `-0007` or `_IM0007`.

    Raises:
      ValueError: the name does not end in a slice number and an extension.
    """
    match = _SLICE_NAME.fullmatch(file)
    if match is None:
        raise ValueError(f'{_show(file)} does not end in a slice number such as _0012.png')
    return match[1], int(match[2])


@functools.lru_cache(maxsize=1024)  # the rows of a scan are contiguous
def parse_patient(scan: str) -> str:
    """Parses the patient ID from a scan ID. For an unknown source, the scan ID is the patient ID."""
    name = scan.rsplit('/', 1)[-1]
    match = _PATIENT.search(name)
    return match[0] if match else name


def find_version(raw_dir: str | os.PathLike[str]) -> str:
    """Returns the COVIDx CT version of a raw directory: '1', '2A' or '3A'.

    Raises:
      UserError: the directory does not exist, or has no list or lists of several versions.
    """
    names = set(_list_directory(raw_dir))
    found = [v for v in VERSIONS if any(get_list_name(split, v) in names for split in SPLITS)]
    if not found:
        raise UserError(
            f'{raw_dir} holds no COVIDx CT lists: expected {get_list_name("train", "2A")} (or -1, -3A) and the same '
            'for val and test; pass the directory that contains them'
        )
    if len(found) > 1:
        raise UserError(
            f'{raw_dir} holds lists of several COVIDx CT versions ({", ".join(found)}): keep those of one, '
            'or use a separate directory for each version'
        )
    return found[0]


def find_images(raw_dir: str, version: str) -> str:
    """Returns the image folder of a raw directory: `<version>_images` or `images`.

    Raises:
      UserError: neither exists.
    """
    candidates = (f'{version}_images', 'images')
    for name in candidates:
        if os.path.isdir(os.path.join(raw_dir, name)):
            return os.path.join(raw_dir, name)
    raise UserError(f'{raw_dir} holds no image folder: expected {" or ".join(candidates)} beside the lists')


def get_list_name(split: str, version: str) -> str:
    """Returns the file name of a split list."""
    return f'{split}_COVIDx_CT-{version}.txt'


def read_list(path: str) -> list[Row]:
    """Reads one list. Accepts a byte order mark, CRLF and trailing blank lines.

    Raises:
      UserError: the list is missing, unreadable or empty, or has bad rows (all counted, the first 20 named).
    """
    rows, faults, _ = parse_list(path, {})
    _raise_faults(faults, os.path.dirname(path) or '.')
    return rows


def find_splits(raw_dir: str) -> tuple[str, ...]:
    """Returns the splits whose lists a raw directory holds, at least one.

    Raises:
      UserError: see `find_version`.
    """
    version, names = find_version(raw_dir), set(_list_directory(raw_dir))
    return tuple(split for split in SPLITS if get_list_name(split, version) in names)


def read_lists(raw_dir: str, splits: Sequence[str] = SPLITS, *, for_training: bool = True) -> dict[str, list[Row]]:
    """Reads the lists of a raw directory.

    Args:
      raw_dir: the directory.
      splits: which lists to read; every one must exist.
      for_training: whether train must have two classes.

    Returns:
      Rows by split ('train', 'val', 'test'), in list order, with the sources that metadata.csv gives.

    Raises:
      UserError: as in `find_version` and `read_list`, but one message covers all lists; also if a file is listed twice
        or train has too few classes.
    """
    version = find_version(raw_dir)
    first_seen: dict[str, str] = {}
    rows, faults = {}, []
    for split in splits:
        rows[split], list_faults, _ = parse_list(os.path.join(raw_dir, get_list_name(split, version)), first_seen)
        if for_training and split == 'train' and not list_faults:
            absent = find_absent_classes(rows[split])
            if len(CLASSES) - len(absent) < 2:
                list_faults = [f'{get_list_name(split, version)}: no row of {" or ".join(absent)}']
        faults += list_faults
    _raise_faults(faults, raw_dir)
    sources = _read_sources(raw_dir)
    return {split: add_sources(of_split, sources) for split, of_split in rows.items()}


def _read_sources(raw_dir: str) -> dict[str, str]:
    path = os.path.join(raw_dir, 'metadata.csv')
    if not os.path.isfile(path):
        return {}
    try:
        return get_sources(read_metadata(path))
    except UserError as error:
        log.warning('the sources of the patients are unknown: %s', error)
        return {}


def get_sources(metadata: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Returns the source of every patient, '' where `metadata` (see `read_metadata`) gives none."""
    return {patient: (columns.get('source') or '').strip() for patient, columns in metadata.items()}


def add_sources(rows: Sequence[Row], sources: Mapping[str, str]) -> list[Row]:
    """Returns rows with the sources of their patients."""
    return [row._replace(source=sources.get(row.patient, '')) for row in rows]


def compute_fingerprint(rows: Mapping[str, Sequence[Row]], **settings: str | int | bool) -> str:
    """Returns the SHA-256, in hex, of the rows in order and the preparation settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for split in (split for split in SPLITS if split in rows):
        # Scan, patient and slice index are derived from the file name.
        lines = (f'{split}\t{row.file}\t{row.label}\t{row.box}\n' for row in rows[split])
        digest.update(''.join(lines).encode())
    return digest.hexdigest()


def read_metadata(path: str) -> dict[str, dict[str, str]]:
    """Reads metadata.csv.

    Returns:
      A dict of columns by name for each patient ID.

    Raises:
      UserError: the file is missing, is not UTF-8 text, has no column 'patient id', or has conflicting rows for
        a patient.
    """
    patients: dict[str, dict[str, str]] = {}
    try:
        with open(path, encoding='utf-8-sig', newline='') as file:
            reader = csv.DictReader(file)
            if 'patient id' not in (reader.fieldnames or ()):
                raise UserError(f"{path} has no column 'patient id': use the metadata.csv that comes with COVIDx CT")
            for columns in reader:
                patient = columns['patient id']
                if patients.setdefault(patient, columns) != columns:
                    raise UserError(
                        f'{path}:{reader.line_num}: patient {_show(patient)} again, with other columns: keep one'
                    )
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}): get permission, or leave it out') from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f'{path} is not a CSV file in UTF-8 ({error}): save it as one') from error
    return patients


def name_age(text: str) -> str:
    """Returns the band of 20 years of an age: '40-59', or 'not a number'."""
    try:
        band = int(float(text)) // 20 * 20
    except (ValueError, OverflowError):
        return 'not a number'
    return f'{band:02}-{band + 19}'


def parse_list(path: str, first_seen: dict[str, str]) -> tuple[list[Row], list[str], set[str]]:
    """Reads one list and collects its faults instead of raising an error.

    Args:
      path: the list.
      first_seen: '<list>:<line>' where each file was first listed; updated with the files of this list.

    Returns:
      The good rows, the faults ('<list>:<line>: <reason>'), and the first word of each bad line, usually its file.
    """
    name = os.path.basename(path)
    try:
        with open(path, 'rb') as file:
            data = file.read()
    except FileNotFoundError:
        return [], [f'{name}: the list is missing'], set()
    except OSError as error:
        return [], [f'{name}: cannot be read: {error.strerror}'], set()
    # Invalid UTF-8 becomes lone surrogates. These are not printable, so `_check_name` reports them with their line.
    text = data.decode('utf-8-sig', errors='surrogateescape').rstrip()
    if not text:
        return [], [f'{name}: the list is empty'], set()
    rows, faults, bad_files = [], [], set()
    for number, line in enumerate(text.split('\n'), start=1):
        try:
            row = _parse_line(line.strip(' \t\r'))
            here = f'{name}:{number}'
            earlier = first_seen.setdefault(row.file, here)
            if earlier is not here:
                raise ValueError(f'{_show(row.file)} is already listed in {earlier}')
        except ValueError as error:
            faults.append(f'{name}:{number}: {error}')
            bad_files.update(line.split()[:1])
        else:
            rows.append(row)
    return rows, faults, bad_files


def _parse_line(line: str) -> Row:
    """Returns the row of a line. Raises ValueError with the reason if the line is bad."""
    match = _LINE.fullmatch(line)
    if match is None:
        raise ValueError(_explain_line(line))
    file, label, *sides = match.groups()
    box = xmin, ymin, xmax, ymax = tuple(map(int, sides))
    _check_name(file)
    if xmax <= max(xmin, 0) or ymax <= max(ymin, 0):
        raise ValueError(f'{file}: the box {" ".join(sides)} is empty')
    scan, slice_index = parse_scan(file)
    return Row(file, int(label), box, scan, parse_patient(scan), slice_index)


def _explain_line(line: str) -> str:
    """Returns the reason why a line does not match `_LINE`."""
    fields = line.split()
    if len(fields) != 6:
        return f'{len(fields)} fields instead of 6 (file class xmin ymin xmax ymax)'
    if fields[1] not in ('0', '1', '2'):
        return f'{_show(fields[0])}: class {_show(fields[1])} is not 0, 1 or 2'
    for field in fields[2:]:
        if not _INTEGER.fullmatch(field):
            return f'{_show(fields[0])}: box value {_show(field)} is not a whole number of pixels'
    return f'{_show(line)} has separators other than spaces and tabs'


def _check_name(file: str) -> None:
    """Raises ValueError if a file name is not a plain path inside the image folder."""
    if not file.isprintable():
        raise ValueError(f'file name {_show(file)} has characters that are not printable UTF-8')
    if '\\' in file:
        raise ValueError(f'file name {_show(file)} has a backslash; write /')
    if '/' in file or ':' in file:
        if file.startswith('/') or re.match('[A-Za-z]:', file):
            raise ValueError(f'file name {_show(file)} is absolute; names are relative to the image folder')
        if not {'', '.', '..'}.isdisjoint(file.split('/')):
            raise ValueError(f'file name {_show(file)} is not a plain path inside the image folder')


def find_absent_classes(rows: Sequence[Row]) -> list[str]:
    """Returns the classes that no row has."""
    present = {row.label for row in rows}
    return [name for label, name in enumerate(CLASSES) if label not in present]


def _raise_faults(faults: Sequence[str], directory: str) -> None:
    if faults:
        raise UserError(f'bad lists in {directory}, fix them and run again: {join_faults(faults)}')


def _list_directory(path: str | os.PathLike[str]) -> list[str]:
    try:
        return os.listdir(path)
    except FileNotFoundError as error:
        raise UserError(f'there is no directory {path}: pass the raw COVIDx CT directory') from error
    except OSError as error:
        raise UserError(f'{path} cannot be listed ({error.strerror}): pass the raw COVIDx CT directory') from error


def _show(text: str) -> str:
    """Returns text as a quoted ASCII string of limited length."""
    return ascii(text if len(text) <= 80 else f'{text[:77]}...')
