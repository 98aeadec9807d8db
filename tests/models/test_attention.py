import jax
import jax.numpy as jnp
import numpy as np
import pytest

from covidjax.models.attention import COMPATIBILITIES, NEED_GLOBAL_FEATURE, ImageAttention

B, N, C, D = 2, 6, 5, 7


@pytest.fixture(scope='module')
def features():
    rng = np.random.default_rng(0)
    return rng.normal(size=(B, N, C)).astype(np.float32), rng.normal(size=(B, D)).astype(np.float32)


def softmax(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize('compatibility', COMPATIBILITIES)
def test_equations_7_to_12(features, compatibility):
    x, g = features
    module = ImageAttention(compatibility, D)
    (context, attention), variables = module.init_with_output(jax.random.key(0), x, g)
    params = variables.get('params', {})
    assert (
        params.keys()
        == {'additive': {'W_p', 'u'}, 'dot': {'W_p'}, 'tanh': {'W_p', 'u'}, 'uniform': set()}[compatibility]
    )
    w, u = np.asarray(params.get('W_p', np.zeros((C, D)))), np.asarray(params.get('u', np.zeros((D, 1))))[:, 0]
    for b in range(B):
        projected = [w.T @ x[b, i] for i in range(N)]
        score = {
            'additive': lambda p: u @ (p + g[b]),  # noqa: B023, called within this iteration
            'dot': lambda p: p @ g[b],  # noqa: B023
            'tanh': lambda p: u @ np.tanh(p + g[b]),  # noqa: B023
            'uniform': lambda p: 0.0,
        }[compatibility]
        expected = softmax(np.array([score(p) for p in projected]))
        np.testing.assert_allclose(attention[b], expected, atol=1e-6)
        np.testing.assert_allclose(context[b], sum(expected[i] * x[b, i] for i in range(N)), atol=1e-5)


def test_no_projection_where_widths_agree(features):
    x, _ = features
    variables = ImageAttention('additive', C).init(jax.random.key(0), x, None)
    assert jax.tree.map(jnp.shape, variables['params']) == {'u': (C, 1)}


@pytest.mark.parametrize('compatibility', COMPATIBILITIES)
def test_global_feature_cancels_where_it_is_not_needed(features, compatibility):
    x, g = features
    module = ImageAttention(compatibility, D)
    variables = module.init(jax.random.key(0), x, g)

    def compute_context(g):
        return module.apply(variables, x, g)[0]

    change = np.abs(compute_context(g) - compute_context(3 * g + 1)).max()
    gradient = np.abs(jax.grad(lambda g: (compute_context(g) ** 2).sum())(g)).max()
    if compatibility in NEED_GLOBAL_FEATURE:
        assert change > 1e-2
        assert gradient > 1e-2
    else:
        assert change < 1e-5
        assert gradient < 1e-5


def test_additive_without_g_never_projects_the_features(features):
    x, g = features
    module = ImageAttention('additive', D)
    variables = module.init(jax.random.key(0), x, g)
    projected = f'f32[{B},{N},{D}]'
    assert projected in str(jax.make_jaxpr(module.apply)(variables, x, g))
    assert projected not in str(jax.make_jaxpr(lambda v, x: module.apply(v, x, None))(variables, x))


def test_uniform_is_global_average_pooling(features):
    context, attention = ImageAttention('uniform', D).apply({}, features[0], None)
    np.testing.assert_allclose(context, features[0].mean(1), atol=1e-6)
    np.testing.assert_allclose(attention, np.full((B, N), 1 / N), rtol=1e-6)


def test_additive_without_g_equals_eq_11(features):
    x, g = features
    module = ImageAttention('additive', D)
    variables = module.init(jax.random.key(0), x, g)
    for short, printed in zip(module.apply(variables, x, None), module.apply(variables, x, g), strict=True):
        np.testing.assert_allclose(short, printed, atol=1e-6)


@pytest.mark.parametrize('compatibility', NEED_GLOBAL_FEATURE)
def test_others_need_g(features, compatibility):
    with pytest.raises(ValueError, match='needs the global feature'):
        ImageAttention(compatibility, D).init(jax.random.key(0), features[0], None)


@pytest.mark.parametrize('with_g', [True, False])
def test_unknown_compatibility(features, with_g):
    x, g = features
    with pytest.raises(ValueError, match=r"must be one of .*'cosine'"):
        ImageAttention('cosine', D).init(jax.random.key(0), x, g if with_g else None)
