import csv

import jax
import numpy as np

from covidjax.data.loader import load_eval_batches
from covidjax.evaluation.predictions import compute_logits, softmax, write_predictions
from covidjax.training.devices import place_batch


def test_each_record_counts_once_and_in_order():
    source = [{'image': np.full((2, 2, 1), i, np.uint8), 'label': 0} for i in range(7)]
    apply = jax.jit(lambda variables, batch: variables * batch['image'][:, 0, 0, :].astype(float))
    batches = load_eval_batches(source, batch_size=3)
    logits = compute_logits(apply, 2.0, map(place_batch, batches), len(source))
    assert logits[:, 0].tolist() == [0, 2, 4, 6, 8, 10, 12]


def test_softmax_of_large_logits():
    np.testing.assert_allclose(softmax(np.array([[1000, 1000 - np.log(3)]], np.float32)), [[0.75, 0.25]], atol=1e-4)


def test_predictions_file(tmp_path):
    columns = {'file': ['CP_1_2_0003.png'], 'scan': ['CP_1_2'], 'patient': ['CP_1'], 'slice': [3], 'label': [1]}
    shares = {'p_normal': 0.25, 'p_pneumonia': 0.5, 'p_covid19': 0.25}
    write_predictions(tmp_path / 'p.csv', columns | {name: np.array([p]) for name, p in shares.items()})
    with (tmp_path / 'p.csv').open() as file:
        (row,) = csv.DictReader(file)
    assert row == {
        'file': 'CP_1_2_0003.png',
        'scan': 'CP_1_2',
        'patient': 'CP_1',
        'slice': '3',
        'label': '1',
        'p_normal': '0.250000000',
        'p_pneumonia': '0.500000000',
        'p_covid19': '0.250000000',
    }
