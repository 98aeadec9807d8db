"""Does the call of a scan depend on the grey window? Compares probabilities under the run's own and further windows."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from covidjax.data.lists import CLASSES


def compare_windows(
    windows_hu: Sequence[tuple[int, int]], probabilities_WxK: np.ndarray, called: int, num_slices: int
) -> dict[str, Any]:
    """Returns the part `windows` of prediction.json.

    Args:
      windows_hu: lower and upper end of each window, the run's own first.
      probabilities_WxK: of the scan, from the same slices under each window.
      called: class that all slices call under the run's own window.
      num_slices: that were seen under each window.

    Returns:
      {'num_slices', 'by_window': [{'window_hu', 'class', 'probabilities'}], 'spread': class -> largest less smallest
      probability, 'largest_spread', 'is_changed': whether any window has another class than `called`}.
    """
    found = probabilities_WxK.argmax(1)
    spread_K = np.ptp(probabilities_WxK, axis=0)
    return {
        'num_slices': num_slices,
        'by_window': [
            {
                'window_hu': list(window),
                'class': CLASSES[label],
                'probabilities': dict(zip(CLASSES, shares.tolist(), strict=True)),
            }
            for window, label, shares in zip(windows_hu, found, probabilities_WxK, strict=True)
        ],
        'spread': dict(zip(CLASSES, spread_K.tolist(), strict=True)),
        'largest_spread': float(spread_K.max()),
        'is_changed': bool((found != called).any()),
    }
