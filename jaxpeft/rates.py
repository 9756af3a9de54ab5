"""Learning rates by the role of an array: LoRA+ and its like, for every method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax

from jaxpeft.spec import nearest

if TYPE_CHECKING:
    import optax


def labels(params: Any) -> Any:
    """The trained arrays' names in place of the arrays, for `optax.multi_transform` and the like.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import lora
        >>> sites = jaxpeft.find({"up": {"kernel": jnp.ones((3, 4))}})
        >>> adapter = jaxpeft.init(jax.random.key(0), lora.Spec(rank=2), sites)
        >>> jaxpeft.labels(adapter.params)
        {'up/kernel': {'a': 'a', 'b': 'b'}}
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: str(path[-1].key), params)


def scale_rates(factors: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies the learning rate of the arrays of some names; put it last in the chain.

    ``{"b": 16}`` is LoRA+ (arXiv 2402.12354 §4: the rate of b is λ times that of a, λ about 16); VB-LoRA's authors give
    the logits ten times the rate of the bank.

    Args:
        factors: {name: factor}; names that are not given keep their rate.

    Raises:
        ValueError: from `init`, if no array has one of the names.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> optimizer = optax.chain(optax.sgd(0.1), scale_rates({"b": 16}))
        >>> params = {"up/kernel": {"a": jnp.ones(1), "b": jnp.ones(1)}}
        >>> updates, _ = optimizer.update(params, optimizer.init(params))
        >>> {name: round(float(leaf[0]), 4) for name, leaf in updates["up/kernel"].items()}
        {'a': -0.1, 'b': -1.6}
    """
    import optax  # Here, because it takes long to import.

    def init(params: Any) -> optax.EmptyState:
        known = sorted(set(jax.tree.leaves(labels(params))))
        for name in factors:
            if name not in known:
                raise ValueError(
                    f"no trained array is called {name!r}, whose rate is to be scaled; {nearest(name, known)}"
                )
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        scaled = jax.tree.map(lambda name, leaf: leaf * factors.get(name, 1.0), labels(updates), updates)
        return scaled, state

    return optax.GradientTransformation(init, update)
