"""An adapter as after some training, without the training."""

import jax

import jaxpeft


def moved(adapter: jaxpeft.Adapter, size: float, seed: int = 5) -> jaxpeft.Adapter:
    """No trained leaf is what it was at the start."""
    leaves, structure = jax.tree.flatten(adapter.params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    other = [leaf + size * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return adapter.replace(params=jax.tree.unflatten(structure, other))
