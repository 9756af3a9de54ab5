"""The frozen weights of a group as one array, for the methods whose start reads them."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxpeft.layout import to_matrix
from jaxpeft.sites import Group, Sites, flatten
from jaxpeft.values import working_dtype


class Weights(Mapping[str, Array]):
    """{group: W0}, (L, in, out), float32 or wider; a group is stacked only when it is asked for.

    Args:
        base: the base parameters.
        sites: the adapted weights.
    """

    def __init__(self, base: Any, sites: Sites) -> None:
        self.leaves, self.sites = flatten(base), sites

    def __getitem__(self, name: str) -> Array:
        group = self.sites[name]
        return jnp.concatenate([self._matrices(group, path) for path in group.paths])

    def __iter__(self) -> Iterator[str]:
        return (group.name for group in self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def _matrices(self, group: Group, path: str) -> Array:
        """The adapted weights of one array, stack axes flattened."""
        weight = self.leaves[path]
        matrices = to_matrix(weight, group.layout).astype(working_dtype(weight.dtype))
        if group.entries is not None:
            matrices = matrices[jnp.asarray(group.entries)]
        return matrices.reshape(-1, group.in_dim, group.out_dim)
