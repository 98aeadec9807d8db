"""Attention over the positions of a feature map: the paper's equations (7) to (12), after Jetley et al. 2018.

Shapes: B batch, N positions, C channels of the local features, D channels of the global feature.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

# PyTorch's default for linear layers, U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
LINEAR_INIT = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')

COMPATIBILITIES = ('additive', 'dot', 'tanh', 'uniform')
NEED_GLOBAL_FEATURE = ('dot', 'tanh')  # with the others the global feature cannot change the output


class ImageAttention(nn.Module):
    """Averages local features x_i, weighted by their compatibility with the global feature g.

    Compatibility functions, with the projected feature p_i = W_p x_i (eq. 7; the identity if C = D):
      'additive': <u, p_i + g> (eq. 11, the paper),
      'dot': <p_i, g> (eq. 12),
      'tanh': <u, tanh(p_i + g)> (the alignment model of Bahdanau et al. 2015),
      'uniform': 0, hence every a_i is 1/N: global average pooling, the baseline for the others.

    In eq. 11 the global feature cancels: <u, W_p x_i + g> = <W_p^T u, x_i> + <u, g>. The second term is the same at
    every position i, so the softmax of eq. 9 removes it. The scores reduce to <v, x_i> with one vector v = W_p^T u,
    which costs D times less than projecting x. Neither g nor the layers that compute g can change the output or receive
    a gradient. Called without g, 'additive' uses this form; called with g, it computes eq. 11 as printed.

    Attributes:
      compatibility: one of COMPATIBILITIES.
      global_features: D.
    """

    compatibility: str
    global_features: int

    @nn.compact
    def __call__(self, x_BxNxC: jax.Array, g_BxD: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Returns the context vector [B, C] (eq. 10, from the unprojected x) and the attentions [B, N] (eq. 9).

        Raises:
          ValueError: unknown compatibility, or a missing g that it needs.
        """
        if self.compatibility not in COMPATIBILITIES:
            raise ValueError(f'compatibility must be one of {COMPATIBILITIES}, got {self.compatibility!r}')
        if self.compatibility in NEED_GLOBAL_FEATURE and g_BxD is None:
            raise ValueError(f'compatibility {self.compatibility!r} needs the global feature')
        if self.compatibility == 'uniform':
            scores_BxN = jnp.zeros_like(x_BxNxC[..., 0])
        else:
            scores_BxN = self._compute_scores(x_BxNxC, g_BxD)
        attention_BxN = nn.softmax(scores_BxN.astype(jnp.promote_types(scores_BxN.dtype, jnp.float32)))
        return jnp.einsum('bn,bnc->bc', attention_BxN, x_BxNxC), attention_BxN

    def _compute_scores(self, x_BxNxC: jax.Array, g_BxD: jax.Array | None) -> jax.Array:
        c, d = x_BxNxC.shape[-1], self.global_features
        w_CxD = self.param('W_p', LINEAR_INIT, (c, d)) if c != d else None
        u_D = None if self.compatibility == 'dot' else self.param('u', LINEAR_INIT, (d, 1))[:, 0]
        if g_BxD is None:
            return x_BxNxC @ (u_D if w_CxD is None else w_CxD @ u_D)
        p_BxNxD = x_BxNxC if w_CxD is None else x_BxNxC @ w_CxD
        g_Bx1xD = g_BxD[:, None]
        if self.compatibility == 'additive':
            return (p_BxNxD + g_Bx1xD) @ u_D
        if self.compatibility == 'dot':
            return (p_BxNxD * g_Bx1xD).sum(-1)
        return jnp.tanh(p_BxNxD + g_Bx1xD) @ u_D
