"""Learning-rate schedules and optimizers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

SCHEDULES = ('constant', 'cosine')
DECAYS = ('decoupled', 'l2')


def create_schedule(schedule: str, *, learning_rate: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Returns step -> learning rate: linear warm-up from 0, then 'constant' or 'cosine' (to 0 at `total_steps`).

    Raises:
      ValueError: unknown schedule.
    """
    if schedule == 'constant':
        after = optax.constant_schedule(learning_rate)
    elif schedule == 'cosine':
        after = optax.cosine_decay_schedule(learning_rate, max(total_steps - warmup_steps, 1))
    else:
        raise ValueError(f'schedule must be one of {SCHEDULES}, got {schedule!r}')
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps]) if warmup_steps else after


class AverageState(NamedTuple):
    """State of `keep_average`.

    Attributes:
      average: of the parameters.
    """

    average: Any


def keep_average(decay: float) -> optax.GradientTransformation:
    """Returns a transformation that averages the parameters after each update, and leaves the update as it is.

    The average starts with the initial parameters and becomes `decay` * average + (1 - `decay`) * parameters. Place it
    last in a chain.
    """

    def update(updates: Any, state: AverageState, params: Any) -> tuple[Any, AverageState]:
        new = optax.apply_updates(params, updates)
        return updates, AverageState(jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.average, new))

    return optax.GradientTransformation(AverageState, update)


def create_optimizer(
    schedule: optax.Schedule,
    *,
    weight_decay: float,
    decay: str,
    ema_decay: float = 0.0,
    is_frozen: Callable[[str], bool],
) -> optax.GradientTransformation:
    """Returns Adam with the paper's (default) moments; frozen parameters get no updates.

    Args:
      schedule: step -> learning rate.
      weight_decay: 0 is plain Adam.
      decay: 'decoupled' (AdamW) or 'l2' (added to the gradient before the moments, as PyTorch's Adam does).
      ema_decay: of `keep_average`; 0 keeps no average.
      is_frozen: path ('tail_0/conv1/dense/kernel') -> whether that parameter is frozen. Frozen parameters have no
        moments and no decay. A zero gradient would not be enough: AdamW would still decay them.

    Raises:
      ValueError: unknown decay.
    """
    if decay not in DECAYS:
        raise ValueError(f'decay must be one of {DECAYS}, got {decay!r}')
    if weight_decay == 0:
        trained = optax.adam(schedule)
    elif decay == 'decoupled':
        trained = optax.adamw(schedule, weight_decay=weight_decay)
    else:
        trained = optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(schedule))

    if ema_decay:
        trained = optax.chain(trained, keep_average(ema_decay))

    def label(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: (
                'frozen' if is_frozen(jax.tree_util.keystr(path, simple=True, separator='/')) else 'trained'
            ),
            params,
        )

    return optax.partition({'trained': trained, 'frozen': optax.set_to_zero()}, label)
