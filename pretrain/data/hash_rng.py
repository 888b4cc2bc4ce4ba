"""Stateless random numbers: hashed counters. Any draw can be repeated without the ones before it.

The mixing function is the finalizer of SplitMix64 (Steele, Lea, Flood 2014).
"""

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(values: np.ndarray) -> np.ndarray:
    """uint64 of the same shape: each value, hashed by a bijection."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def key(*counters: int) -> np.uint64:
    """The uint64 key of a sequence of `counters`."""
    value = np.zeros(1, np.uint64)
    for counter in counters:
        value = mix(derive(value, counter & (2**64 - 1)))
    return value[0]


def derive(keys: np.ndarray | np.uint64, counters: np.ndarray | int) -> np.ndarray:
    """uint64: a new key for each pair of key and counter, broadcast."""
    with np.errstate(over="ignore"):
        return mix((np.asarray(counters, np.uint64) + np.uint64(1)) * GOLDEN + keys)


def uniform(keys: np.ndarray) -> np.ndarray:
    """float64 in [0, 1)."""
    return (keys >> np.uint64(11)).astype(np.float64) * 2.0**-53


def integers(keys: np.ndarray, bounds: np.ndarray | int) -> np.ndarray:
    """int64 in [0, bounds), for bounds below 2**32. The bias is below bounds / 2**32."""
    products = (keys >> np.uint64(32)) * np.asarray(bounds, np.uint64)
    return (products >> np.uint64(32)).astype(np.int64)
