"""Schedules: plain functions from a step, or a count of samples, to yes or no."""

from __future__ import annotations

ARRAYS_PER_RUN = 64
FLIGHT = "flight"  # phase of what the flight recorder keeps
RING = 256  # last steps of which it keeps everything
_DENSE, _RATIO = 8, 1.25
_KEPT = frozenset(range(_DENSE)) | {round(_DENSE * _RATIO**k) for k in range(ARRAYS_PER_RUN - 1 - _DENSE)}
_RARE = frozenset(sorted(_KEPT)[::4])


def is_sampled(step: int, every: int) -> bool:
    """Tell whether a step is sampled: the first, then each multiple of `every`."""
    return step % every == 0


def keeps_arrays(sample: int) -> bool:
    """Tell whether full arrays are kept at the n-th sampled step.

    The first eight samples are kept, then samples 8 * 1.25**k: at most 63 in all, however long the run (the 55 terms
    reach sample 1.4 million), and one more is written when the run closes. Spacing grows with the step, so early
    training, where most happens, is dense.

    Args:
        sample: index of the sampled step, from 0.

    Returns:
        Whether full per-channel arrays are stored.

    >>> [n for n in range(30) if keeps_arrays(n)]
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24]
    """
    return sample in _KEPT


def is_rare(sample: int) -> bool:
    """Tell whether what costs much is measured at the n-th sampled step: at every fourth of those that keep arrays.

    Args:
        sample: index of the sampled step, from 0.

    Returns:
        Whether it is one of them; each lies about 2.4 times as far as the one before.

    >>> [n for n in range(200) if is_rare(n)]
    [0, 4, 8, 20, 48, 116]
    """
    return sample in _RARE
