"""The record files of COVIDx CT: a TFDS dataset of slices, stored as PNG in ArrayRecord files.

Neither writing nor reading needs TensorFlow.

The builder is shard-based because TFDS's `GeneratorBasedBuilder` sorts splits above 1 GB through `tf.io.gfile`. A
`ShardBasedBuilder` writes shard after shard in list order and needs little memory.
"""

import contextlib
import dataclasses
import functools
import glob
import io
import itertools
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import filelock
import joblib
import numpy as np
import tensorflow_datasets as tfds
from absl import logging as absl_logging
from joblib.externals import loky

from covidjax.data import lists, preprocess
from covidjax.data.covidx_ct import Prepared, SliceSource
from covidjax.errors import WORKER_KILLED, UserError, join_faults
from covidjax.progress import open_progress

log = logging.getLogger(__name__)

BATCH_SIZE = 32  # slices per worker task: about 1/8 s of work at 224 pixels
SHARD_SIZE = 4096  # slices per record file: 100 MB at 224 pixels; at most one shard is in memory

RECORDED_COLUMNS = ('label', 'file', 'scan', 'patient', 'slice_index')  # columns stored with the image

BadImages = dict[tuple[str, str], str]  # (split, file) -> reason


@dataclasses.dataclass
class CovidxCtConfig(tfds.core.BuilderConfig):
    """Settings of one prepared dataset.

    Attributes:
      image_size: side of the prepared slices in pixels.
      region: see `preprocess.load_slice`.
      skip_bad: True drops and records missing and unreadable images; False raises an error for them.
      splits: the lists that are prepared.
      for_training: whether train must have two classes, and keep its classes.
      fingerprint: SHA-256, in hex, of the lists and the first three settings.
    """

    image_size: int = 224
    region: str = 'body'
    skip_bad: bool = False
    splits: tuple[str, ...] = lists.SPLITS
    for_training: bool = True
    fingerprint: str = ''


class CovidxCt(tfds.core.ShardBasedBuilder):
    """TFDS builder of COVIDx CT-1, CT-2A and CT-3A; `manual_dir` is the raw directory."""

    name = 'covidx_ct'
    VERSION = tfds.core.Version('1.0.0')  # raise it when the same lists and settings give other records
    BUILDER_CONFIGS = tuple(
        CovidxCtConfig(name=version.lower(), description=f'COVIDx CT-{version}') for version in lists.VERSIONS
    )
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        'Download COVIDx CT from https://www.kaggle.com/hgunraj/covidxct. The manual directory is the one that holds '
        'the lists, train_COVIDx_CT-2A.txt for example, and the image folder.'
    )

    # Disables TFDS's search for a checksum file. Nothing is downloaded, and the search needs importlib_resources, which
    # TFDS does not always install.
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.image_size
        return tfds.core.DatasetInfo(
            builder=self,
            description='Chest CT slices with COVID-19, with pneumonia and with neither, cropped to the body.',
            homepage='https://github.com/haydengunraj/COVIDNet-CT',
            features=tfds.features.FeaturesDict(
                {
                    'image': tfds.features.Image(shape=(size, size, 1), encoding_format='png'),
                    'label': tfds.features.ClassLabel(names=lists.CLASSES),
                    'file': tfds.features.Text(),
                    'scan': tfds.features.Text(),
                    'patient': tfds.features.Text(),
                    'slice_index': np.int64,
                }
            ),
            supervised_keys=('image', 'label'),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _download_and_prepare(self, dl_manager, download_config=None) -> None:
        raw_dir = os.fspath(dl_manager.manual_dir)
        config = self.builder_config
        self._rows = lists.read_lists(raw_dir, config.splits, for_training=config.for_training)
        self._images = lists.find_images(raw_dir, lists.find_version(raw_dir))
        self._bad = _find_missing(self._rows, self._images)
        self._check_bad()  # report a wrong image folder before decoding anything
        with open_progress('preparing', sum(map(len, self._rows.values())), 'slice') as self._progress:
            super()._download_and_prepare(dl_manager, download_config)
        self._check_bad()
        self.info.metadata['dropped'] = [[split, file, reason] for (split, file), reason in self._bad.items()]

    def _check_bad(self) -> None:
        if self._bad and not self.builder_config.skip_bad:
            _raise_bad_images(self._bad, self._rows, self._images)
        _check_remaining(self._rows, _drop_rows(self._rows, self._bad), self._images, self.builder_config.for_training)

    def _shard_iterators_per_split(self, dl_manager) -> dict[str, list]:
        del dl_manager
        return {
            split: [functools.partial(self._generate_shard, split, start) for start in range(0, len(rows), SHARD_SIZE)]
            for split, rows in self._rows.items()
        }

    def _generate_shard(self, split: str, start: int) -> Iterator[tuple[int, dict]]:
        """Yields (key, features) for each good slice of one shard and records the bad ones in `_bad`."""
        rows = self._rows[split][start : start + SHARD_SIZE]
        present = [row for row in rows if (split, row.file) not in self._bad]
        self._progress.update(len(rows) - len(present))
        encoded = _encode_slices(present, self._images, self.builder_config)
        for key, (row, (png, fault)) in enumerate(zip(present, encoded, strict=True), start):
            self._progress.update()
            if fault:
                self._bad[split, row.file] = fault
                continue
            yield key, {'image': io.BytesIO(png), **{name: getattr(row, name) for name in RECORDED_COLUMNS}}


def open_records(
    raw_dir: str,
    version: str,
    rows: Mapping[str, Sequence[lists.Row]],
    data_dir: str,
    *,
    image_size: int,
    region: str,
    skip_bad: bool,
    for_training: bool,
) -> Prepared:
    """Opens the record files of a raw directory, or writes them first.

    Args:
      raw_dir, image_size, region, skip_bad, for_training: see `covidx_ct.prepare`.
      version: '1', '2A' or '3A'.
      rows: of every split to prepare.
      data_dir: parent folder of prepared datasets.

    Raises:
      UserError: see `covidx_ct.prepare`.
    """
    # With skip_bad, a dataset prepared without skip_bad also fits: it has no bad images.
    configs = [
        dataclasses.replace(_create_config(version, rows, image_size, region, skip), for_training=for_training)
        for skip in ([True, False] if skip_bad else [False])
    ]
    with _quiet_tfds():
        for config in configs:
            builder = CovidxCt(config=config, data_dir=data_dir)
            if builder.is_prepared():
                return _open(builder, raw_dir, version, rows)
        config_dir = os.path.join(data_dir, CovidxCt.name, configs[0].name)
        with _report_failures(config_dir), _lock(config_dir):
            # Create the builder under the lock: it reads the disk when created, and another process may have written.
            builder = CovidxCt(config=configs[0], data_dir=data_dir)
            if not builder.is_prepared():
                _write(builder, os.path.abspath(raw_dir))
        return _open(builder, raw_dir, version, rows)


def _create_config(version: str, rows: Mapping, image_size: int, region: str, skip_bad: bool) -> CovidxCtConfig:
    """Returns a config whose name, and so its folder, contains a fingerprint of the lists and settings."""
    settings = {'version': version, 'image_size': image_size, 'skip_bad': skip_bad, 'format': str(CovidxCt.VERSION)}
    if region != 'body':  # so that what earlier versions prepared still counts
        settings['region'] = region
    if region == 'lungs':
        from covidjax.models.lesion_weights import read_box_digest  # loads jax

        settings['lungs'] = read_box_digest()
    fingerprint = lists.compute_fingerprint(rows, **settings)
    plain = next(config for config in CovidxCt.BUILDER_CONFIGS if config.name == version.lower())
    name = f'{plain.name}_{image_size}px_{fingerprint[:12]}'
    return dataclasses.replace(
        plain,
        name=name,
        image_size=image_size,
        region=region,
        skip_bad=skip_bad,
        splits=tuple(rows),
        fingerprint=fingerprint,
    )


def _write(builder: CovidxCt, raw_dir: str) -> None:
    """Writes a dataset. The caller must hold its lock."""
    for leftover in glob.glob(os.path.join(glob.escape(os.path.dirname(builder.data_dir)), 'incomplete.*')):
        shutil.rmtree(leftover)  # left by a killed run
    log.info('preparing %s at %d pixels in %s', raw_dir, builder.builder_config.image_size, builder.data_dir)
    try:
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=raw_dir), file_format='array_record'
        )
    finally:
        # Otherwise idle workers stay alive, and after an interrupt they go on decoding.
        loky.get_reusable_executor(reuse=True).shutdown(wait=True, kill_workers=True)


def _open(builder: CovidxCt, raw_dir: str, version: str, rows: Mapping[str, list[lists.Row]]) -> Prepared:
    try:
        _check_sizes(builder)
        bad = {(split, file): reason for split, file, reason in builder.info.metadata['dropped']}
        # `SliceSource` decodes the raw bytes.
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        kept = _drop_rows(rows, bad)
        sources = {
            split: SliceSource(
                builder.as_data_source(split, deserialize_method=raw).data_source,
                builder.data_dir,
                [row.file for row in kept[split]],
            )
            for split in rows
        }
    except Exception as error:  # damaged files can raise anything
        reason = ' '.join(str(error).split())
        raise UserError(
            f'the prepared dataset in {builder.data_dir} is damaged ({reason}): delete it and run again'
        ) from error
    if bad:
        log.warning('%d images were dropped when %s was prepared', len(bad), builder.data_dir)
    dropped = [(file, reason) for (_, file), reason in bad.items()]
    fingerprint = builder.builder_config.fingerprint
    return Prepared(Path(raw_dir), version, fingerprint, builder.data_dir, kept, sources, dropped)


def _check_sizes(builder: CovidxCt) -> None:
    """Raises an error if a record file is missing or truncated. Flipped bits only show when a record is read."""
    for split in builder.builder_config.splits:
        info = builder.info.splits[split]
        size = sum(os.path.getsize(path) for path in info.filepaths)
        if size != info.num_bytes:
            raise ValueError(f'{size} bytes of {split} instead of {info.num_bytes}')


def _encode_slices(rows: Sequence[lists.Row], images: str, config: CovidxCtConfig) -> Iterator[tuple[bytes, str]]:
    """Yields (PNG bytes, '') or (b'', reason) for each row, in row order; worker processes decode on all cores."""
    tasks = [(os.path.join(images, row.file), row.box) for row in rows]
    batches = [tasks[start : start + BATCH_SIZE] for start in range(0, len(tasks), BATCH_SIZE)]
    num_workers = max(1, min(joblib.cpu_count(), len(batches)))
    # max_nbytes=None turns off memory mapping, which does not pay for small batches of paths.
    parallel = joblib.Parallel(n_jobs=num_workers, return_as='generator', batch_size=1, max_nbytes=None)
    results = parallel(
        joblib.delayed(preprocess.encode_slices)(batch, config.image_size, os.getpid(), config.region)
        for batch in batches
    )
    try:
        yield from itertools.chain.from_iterable(results)
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # joblib warns of cancelled tasks; after an error that is intended
            results.close()


def _find_missing(rows: Mapping[str, Sequence[lists.Row]], images: str) -> BadImages:
    """Returns the listed images that do not exist. Each folder is listed once."""
    listings: dict[str, set[str]] = {}
    missing = {}
    for split, split_rows in rows.items():
        for row in split_rows:
            folder, name = os.path.split(row.file)
            if folder not in listings:
                listings[folder] = _list_files(os.path.join(images, folder))
            if name not in listings[folder]:
                missing[split, row.file] = 'missing'
    return missing


def _list_files(folder: str) -> set[str]:
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError as error:
        raise UserError(f'{folder} cannot be listed ({error.strerror}): fix its permissions') from error


def _drop_rows(rows: Mapping[str, Sequence[lists.Row]], bad: BadImages) -> dict[str, list[lists.Row]]:
    return {split: [row for row in rows[split] if (split, row.file) not in bad] for split in rows}


def _raise_bad_images(bad: BadImages, rows: Mapping[str, Sequence[lists.Row]], images: str) -> None:
    order = {(split, row.file): i for i, (split, row) in enumerate((s, row) for s in rows for row in rows[s])}
    faults = [f'{key[1]} ({bad[key]})' for key in sorted(bad, key=order.get)]
    raise UserError(
        f'images listed but missing or unreadable in {images}: {join_faults(faults)}: restore them, or drop them '
        'with --config.data.skip_bad=True'
    )


def _check_remaining(
    listed: Mapping[str, Sequence], kept: Mapping[str, Sequence], images: str, for_training: bool
) -> None:
    """Raises UserError if, without the bad images, a split is empty or, for training, train loses a class."""
    lost = [f'{split} is empty' for split in kept if not kept[split]]
    if for_training and kept['train']:
        absent = {row.label for row in listed['train']} - {row.label for row in kept['train']}
        lost += [f'train has no {lists.CLASSES[label]}' for label in sorted(absent)]
    if lost:
        raise UserError(f'too many images are missing or unreadable in {images}: without them, {", ".join(lost)}')


@contextlib.contextmanager
def _lock(config_dir: str) -> Iterator[None]:
    """Creates a dataset's folder and locks it against other processes. The OS frees the lock of a killed process."""
    os.makedirs(config_dir, exist_ok=True)
    lock = filelock.FileLock(os.path.join(config_dir, 'prepare.lock'))
    try:
        held = lock.acquire(timeout=0)
    except filelock.Timeout:
        log.info('another process is preparing %s, waiting for it', config_dir)
        held = lock.acquire()
    with held:
        yield


@contextlib.contextmanager
def _report_failures(config_dir: str) -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise UserError(f'the dataset cannot be prepared in {config_dir}: {WORKER_KILLED}') from error
    except (OSError, RuntimeError) as error:  # the record writer raises RuntimeError on a full disk
        reason = getattr(error, 'strerror', None) or ' '.join(str(error).split())
        raise UserError(
            f'the dataset cannot be prepared in {config_dir} ({reason}): make room or fix its permissions, '
            'or set --config.data.prepared_dir'
        ) from error


class _DropTfdsRecords(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or not record.pathname.startswith(os.path.dirname(tfds.__file__))


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Silences the logs below ERROR and the console output of TFDS; this module logs what the user needs."""
    log_filter = _DropTfdsRecords()
    absl_logging.get_absl_logger().addFilter(log_filter)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl_logging.get_absl_logger().removeFilter(log_filter)
