import jax.numpy as jnp
import numpy as np
import pytest

from covidjax.evaluation.outputs import BATCH_SIZE, apply_in_batches, compute_outputs
from covidjax.models.att2 import Att2
from tests.variables import draw_variables


@pytest.mark.parametrize('count', [1, BATCH_SIZE, 2 * BATCH_SIZE + 3])
def test_batches_give_one_output_for_each_example(count):
    values = np.arange(count)
    outputs = apply_in_batches(lambda x: (2 * x, np.concatenate([x, -x])), BATCH_SIZE, values)
    np.testing.assert_array_equal(outputs[0], 2 * values)
    np.testing.assert_array_equal(outputs[1], values)  # rows that a function adds to its batch are no examples


def test_statistics_of_a_mirrored_model_are_those_of_the_slices():
    mirrored = Att2(backbone='efficientnet_lite0', mirror=True)
    plain = mirrored.clone(mirror=False)
    variables = draw_variables(plain, jnp.zeros((1, 32, 32, 1)), train=False)
    count = BATCH_SIZE + 2
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 1), dtype=np.uint8)
    found = compute_outputs(mirrored, variables, images)
    assert {len(x) for x in (found.logits, found.embedding, *found.attention, *found.evidence)} == {count}
    expected = compute_outputs(plain, variables, images).statistics
    np.testing.assert_allclose(found.statistics, expected, rtol=1e-3, atol=1e-4)
