"""Many intervals at once, as one boolean per position."""

import numpy as np

# Below this mean length one running sum over all positions beats one slice per interval.
_LONG = 100


def span_mask(size: int, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Returns (size,) bool, true inside the half-open intervals, which must not overlap; empty ones are skipped."""
    real = ends > starts
    starts, ends = starts[real], ends[real]
    if starts.size * _LONG < size:
        return _by_slices(size, starts, ends)
    steps = np.zeros(size + 1, dtype=np.int8)
    # A position can end one interval and begin the next, but never begin (or end) two.
    steps[starts] += 1
    steps[ends] -= 1
    return np.cumsum(steps[:size], dtype=np.int8, out=steps[:size]).view(np.bool_)


def _by_slices(size: int, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    mask = np.zeros(size, dtype=np.bool_)
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        mask[start:end] = True
    return mask
