"""COVIDx CT as square grey slices, cropped to the body: a prepared dataset that is open for reading.

Call `prepare`: the first call converts a raw directory to the record files of `records`, later calls open them.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from covidjax.data import lists, preprocess
from covidjax.errors import UserError


class SliceSource:
    """Random access to the prepared slices of a split, in record order. Picklable and thread-safe.

    Args:
      records: serialised examples.
      path: folder of the record files, for error messages.
      files: image file name of each record, for error messages.
    """

    def __init__(self, records: Sequence[bytes], path: str, files: Sequence[str]):
        self._records = records
        self._path = path
        self._files = files

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        """Returns {'image': uint8 [size, size, 1], 'label': int} of one record.

        Raises:
          IndexError: `index` is out of range.
          UserError: the record is unreadable.
        """
        if not 0 <= index < len(self):
            raise IndexError(f'record {index} of {len(self)}')
        try:
            from tensorflow_datasets.proto import tf_example_pb2  # see `prepare`

            # Decode by hand: TFDS decodes all features and takes more than twice as long.
            features = tf_example_pb2.Example.FromString(self._records[index]).features.feature
            return {
                'image': preprocess.decode_png(features['image'].bytes_list.value[0]),
                'label': features['label'].int64_list.value[0],
            }
        except Exception as error:  # damaged records can raise anything
            raise UserError(
                f'record {index} ({self._files[index]}) of the prepared dataset in {self._path} is unreadable '
                f'({" ".join(str(error).split())}): delete that folder and run again'
            ) from error

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """Returns the records at several indices."""
        return [self[index] for index in indices]


class Prepared(NamedTuple):
    """A prepared dataset, open for reading.

    Attributes:
      raw_dir: folder of the lists and images.
      version: '1', '2A' or '3A'.
      fingerprint: SHA-256, in hex, of the lists and the preparation settings.
      path: folder of the record files.
      rows: list rows of each split, in record order, without dropped rows.
      sources: records of each split.
      dropped: (file, reason) of each listed image that was missing or unreadable.
      fold: name of the fold that was selected (see `folds.select_fold`), '' for the lists as they are.
    """

    raw_dir: Path
    version: str
    fingerprint: str
    path: str
    rows: dict[str, list[lists.Row]]
    sources: dict[str, SliceSource]
    dropped: list[tuple[str, str]]
    fold: str = ''


def prepare(
    raw_dir: str,
    *,
    image_size: int,
    prepared_dir: str,
    region: str = 'body',
    skip_bad: bool = False,
    splits: Sequence[str] = lists.SPLITS,
    for_training: bool = True,
) -> Prepared:
    """Prepares a raw directory if necessary and opens the prepared dataset.

    The folder name contains a fingerprint of the lists and settings: another list or image size gives a new dataset.
    The dataset is written to a temporary folder and renamed when it is complete. A second process that needs the same
    dataset waits for the first.

    Args:
      raw_dir: directory with the lists and the image folder.
      image_size: side of the prepared slices in pixels.
      region: see `preprocess.load_slice`.
      prepared_dir: parent folder of prepared datasets; '' is TFDS's default, $TFDS_DATA_DIR or ~/tensorflow_datasets.
      skip_bad: drop and record missing and unreadable images instead of raising an error.
      splits: the lists to prepare; each must exist.
      for_training: False allows any classes in train.

    Raises:
      UserError: bad lists (see `lists.read_lists`); no image folder; missing or unreadable images (all counted, the
        first 20 named); with `skip_bad`, a split that becomes empty or a class missing from train; a prepared directory
        that cannot be written or is damaged; a worker process that was killed.
    """
    version = lists.find_version(raw_dir)
    rows = lists.read_lists(raw_dir, splits, for_training=for_training)
    data_dir = prepared_dir or os.environ.get('TFDS_DATA_DIR') or os.path.join('~', 'tensorflow_datasets')
    data_dir = os.path.abspath(os.path.expanduser(data_dir))
    from covidjax.data.records import open_records  # loads TFDS, which takes a third of a second; `predict` needs none

    settings = {'image_size': image_size, 'region': region, 'skip_bad': skip_bad, 'for_training': for_training}
    return open_records(raw_dir, version, rows, data_dir, **settings)
