"""The state of a training run."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
    """Everything that training changes.

    Attributes:
      step: int32 scalar, number of updates so far.
      params, batch_stats: the model's variables.
      opt_state: the optimizer's state.
      key: root key of the run; it never changes, each use folds in the step.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    key: jax.Array

    @property
    def variables(self) -> dict[str, Any]:
        """The variables that are validated, tested and exported, as `Module.apply` takes them.

        Where the optimizer keeps an average of the parameters (see `optimizer.keep_average`), it takes their place.
        """
        average = optax.tree.get(self.opt_state, 'average')
        params = self.params
        if average is not None:
            # The optimizer does not see frozen parameters.
            params = jax.tree.map(
                lambda a, p: p if isinstance(a, optax.MaskedNode) else a,
                average,
                params,
                is_leaf=lambda node: isinstance(node, optax.MaskedNode),
            )
        return {'params': params, 'batch_stats': self.batch_stats}


def create_train_state(
    variables: dict[str, Any], optimizer: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    """Returns the initial state, at step 0."""
    params = variables['params']
    return TrainState(jnp.int32(0), params, variables['batch_stats'], optimizer.init(params), key)
