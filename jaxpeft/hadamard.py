"""The Walsh–Hadamard transform in O(P log P), and the frozen random projection built on it (fastfood)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

RADIX = 16
"""Size of one butterfly: a small matrix product instead of four stages of sums compiles in a third of the time."""


def transform(x: Array) -> Array:
    """H·x over the last axis, of a length P that is a power of two: H is orthonormal (1/√P) and its own inverse.

    Examples:
        >>> import jax.numpy as jnp
        >>> transform(jnp.array([3.0, 1.0, 0.0, 0.0])).tolist()
        [2.0, 1.0, 2.0, 1.0]
    """
    *lead, length = x.shape
    if length & (length - 1) or not length:
        raise ValueError(f"a Walsh–Hadamard transform needs a power of two; found length {length}")
    done = 1
    while done < length:
        butterfly = _matrix(min(RADIX, length // done))
        x = x.reshape(-1, len(butterfly), done)
        x = jnp.einsum("pq,aqs->aps", butterfly, x, precision="highest")
        done *= len(butterfly)
    return x.reshape(*lead, length)


def _matrix(size: int) -> np.ndarray:
    """The orthonormal Hadamard matrix of a small power of two, Sylvester's."""
    matrix, pair = np.ones((1, 1), np.float32), np.array([[1, 1], [1, -1]], np.float32)
    while len(matrix) < size:
        matrix = np.kron(matrix, pair)
    return matrix / np.float32(np.sqrt(size))


def padded(size: int) -> int:
    """P, the least power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def draw(key: Array, number: int, size: int) -> dict[str, Array]:
    """Frozen arrays of `number` independent fastfood projections to `size` entries.

    Returns:
        ``signs``, uint8, 1 where B is -1 and 0 where it is 1; ``permutation``, int32; ``gaussian`` N(0, 1), float32;
        each (number, P).
    """
    length = padded(size)
    signs_key, permutation_key, gaussian_key = jax.random.split(key, 3)
    return {
        "signs": jax.random.bernoulli(signs_key, shape=(number, length)).astype(jnp.uint8),
        "permutation": permutations(permutation_key, number, length),
        "gaussian": jax.random.normal(gaussian_key, (number, length)),
    }


def fastfood(x: Array, frozen: Mapping[str, Array], size: int) -> Array:
    """F·x = the first `size` entries of H·diag(G)·Π·H·diag(B)·x for every row, x zero-padded to P.

    B, Π and G are the signs, the permutation and the gaussian of `draw`. An entry of F·x has the mean square |x|² / P.
    Source: Le, Sarlós and Smola, arXiv 1408.3060, without the scaling matrix S, as SuperLoRA has it.

    Args:
        x: (number, n), n at most P.
        frozen: what `draw` returned.
        size: entries to keep, at most P.

    Returns:
        (number, size)
    """
    signs = 1 - 2 * frozen["signs"].astype(x.dtype)
    mixed = transform(extend(x, signs.shape[1]) * signs)
    return transform(frozen["gaussian"] * permute(mixed, frozen["permutation"]))[:, :size]


def extend(x: Array, length: int) -> Array:
    """Every row followed by zeros, (number, n) -> (number, length)."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1])))


def permutations(key: Array, number: int, length: int) -> Array:
    """Independent uniform permutations of 0..length-1, (number, length) int32."""
    permute_one = jax.vmap(lambda key: jax.random.permutation(key, length))
    return permute_one(jax.random.split(key, number)).astype(jnp.int32)


def permute(x: Array, index: Array) -> Array:
    """x[index] for every row of x and index, (number, n).

    No index repeats, so the backward is a scatter without collisions: it is deterministic on every backend.
    """
    return jax.vmap(lambda x, index: x.at[index].get(unique_indices=True, mode="promise_in_bounds"))(x, index)


def check_permutations(name: str, index: np.ndarray) -> None:
    """Raises ValueError unless every row is a permutation."""
    if not (np.sort(index, axis=1) == np.arange(index.shape[1])).all():
        raise ValueError(f"{name}: a row is not a permutation of 0..{index.shape[1] - 1}")
