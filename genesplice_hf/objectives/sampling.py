"""Random numbers that belong to an example, not to a batch, a worker or an order.

Every draw is a hash of (seed, epoch, identity of the example, stream, counter), computed for a whole
batch at once. The hash is the output function of SplitMix64 (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014); a counter-based generator needs no state, so the numbers of
one example are the same whoever asks for them and whatever was asked before.

Shapes: B examples, M draws.
"""

import hashlib
import logging
import math
import secrets
from collections.abc import Sequence

import numpy as np
import torch

from genesplice_hf.errors import GeneSpliceError

logger = logging.getLogger(__name__)

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_MAX_SEED = 2**63 - 1


def mix(x: np.ndarray) -> np.ndarray:
    """Scrambles each 64-bit word of `x` (uint64 array, any shape) into an independent looking one."""
    x = x ^ (x >> np.uint64(30))
    x *= _MULTIPLIER_1
    x ^= x >> np.uint64(27)
    x *= _MULTIPLIER_2
    x ^= x >> np.uint64(31)
    return x


def content_identity(content: bytes | memoryview) -> int:
    """Identity of an example that brings no name: a 64-bit hash of what it holds."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def named_identity(example_id: object) -> int:
    """Identity of an example by its name.

    Args:
        example_id: a whole number (Python, numpy or a tensor of one element) or a string.

    Raises:
        GeneSpliceError: for any other type.
    """
    values = np.asarray(example_id)
    name = values.item() if values.size == 1 else None
    if isinstance(name, bool) or not isinstance(name, (int, str)):
        raise GeneSpliceError(
            f"`example_id` must be a whole number or a string, it is {example_id!r}; leave the key out to "
            "have the example known by its content"
        )
    return content_identity(f"{type(name).__name__}:{name}".encode())


def bits(keys: np.ndarray, rows: np.ndarray, counters: np.ndarray, stream: int) -> np.ndarray:
    """Draws 64 random bits for each (example, counter).

    Args:
        keys: (B,) uint64, one key per example, from `ExampleRandom.keys`.
        rows: (M,) index of the example that each draw belongs to.
        counters: (M,) position of the draw inside its example.
        stream: what the draw is for; different streams are independent.

    Returns:
        (M,) uint64.
    """
    stream_keys = mix(keys + np.full(keys.shape, stream + 1, np.uint64) * _GAMMA)
    words = counters.astype(np.uint64)
    words *= _GAMMA
    words += (stream_keys + _GAMMA)[rows]
    return mix(words)


def happens(words: np.ndarray, probability: float) -> np.ndarray:
    """Same as `to_uniform(words) < probability`, in whole numbers."""
    return words >> np.uint64(11) < np.uint64(math.ceil(probability * 2**53))


def to_uniform(words: np.ndarray) -> np.ndarray:
    """Turns 64 random bits into a float64 in [0, 1)."""
    return (words >> np.uint64(11)) * 2.0**-53


def to_below(words: np.ndarray, limits: np.ndarray | int) -> np.ndarray:
    """Turns 64 random bits into an int64 in [0, limit), limit < 2**31, by multiply and shift."""
    scaled = (words >> np.uint64(32)) * np.asarray(limits, dtype=np.uint64)
    return (scaled >> np.uint64(32)).astype(np.int64)


class ExampleRandom:
    """Gives every example its own key for (seed, epoch).

    Args:
        seed: a whole number in [0, 2**63); None draws one, once, and logs it.

    The epoch lives in shared memory, so that `set_epoch` also reaches the persistent workers of a
    `DataLoader`.
    """

    def __init__(self, seed: int | None = None):
        if seed is None:
            seed = secrets.randbelow(2**32)
            logger.info("no `seed` was given; drew %d", seed)
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= _MAX_SEED:
            raise GeneSpliceError(f"`seed` must be a whole number in [0, 2**63) or None, it is {seed!r}")
        self.seed = seed
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch[0])

    def set_epoch(self, epoch: int) -> None:
        """Makes the next draws those of `epoch` (a whole number, zero or more)."""
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise GeneSpliceError(f"`epoch` must be a whole number, zero or more, it is {epoch!r}")
        self._epoch[0] = epoch

    def keys(self, identities: Sequence[int]) -> np.ndarray:
        """Keys (B,) uint64 of the examples with these 64-bit identities in the present epoch."""
        epoch_key = mix(mix(np.array([self.seed], np.uint64)) + np.array([self.epoch], np.uint64) * _GAMMA)
        return mix(epoch_key + mix(np.asarray(identities, dtype=np.uint64)))
