"""Is what a caller passed what was expected? If not, errors name both, before anything is computed."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.adapter import Adapter, abstract, check_one
from jaxpeft.sites import Sites, paths_and_leaves
from jaxpeft.spec import Spec, kind_of, method_of, name_of


def adapters(given: Any) -> list[Any]:
    """What an argument that takes one adapter or several stands for, as a list.

    Raises:
        TypeError: it is, or holds, something else.
        ValueError: an adapter's arrays are not those of its spec and sites.
    """
    found = [given] if _is_adapter(given) or not isinstance(given, list | tuple) else list(given)
    for one in found:
        if not _is_adapter(one):
            hint = ""
            if isinstance(one, Mapping):
                hint = "; trained arrays alone are none: pass the adapter itself, or adapter.replace(params=…)"
            elif isinstance(given, tuple) and any(map(_is_adapter, found)):
                hint = "; what to_lora and combine return is an adapter and a report on it: pass the first"
            raise TypeError(f"expected an adapter, or several in a list, found {kind_of(one)}{hint}")
        if isinstance(one, Adapter):
            arrays(one)
    return found


def arrays(adapter: Adapter) -> None:
    """Raises ValueError unless an adapter's arrays have the names and shapes that its spec makes of its sites."""
    if not hasattr(method_of(adapter.spec), "init"):  # A method that makes none says nothing of their shapes.
        return
    wanted = _shapes(adapter.spec, adapter.sites)
    found = _shapes_of(adapter)
    if found == wanted:
        return
    missing, unexpected = (
        [f"{item} {path}" for item, path in one.keys() - other.keys()]
        for one, other in ((wanted, found), (found, wanted))
    )
    who = f"the adapter's arrays are not those of its {name_of(adapter.spec)}.Spec and sites"
    if missing or unexpected:
        raise ValueError(f"{who}: missing {sorted(missing) or 'nothing'}, unexpected {sorted(unexpected) or 'nothing'}")
    item, path = key = next(key for key in wanted if wanted[key] != found[key])
    raise ValueError(f"{who}: {item} {path} has shape {found[key]}, expected {wanted[key]}")


def adapter(given: Any) -> None:
    """Raises TypeError unless it is one adapter, and ValueError unless its arrays are those of its spec and sites."""
    check_one(given)
    arrays(given)


def _is_adapter(value: Any) -> bool:
    """Also of what stands for one, as `batch.Expanded`."""
    return isinstance(getattr(value, "sites", None), Sites) and hasattr(value, "updates")


@functools.lru_cache(maxsize=256)
def _shapes(spec: Spec, sites: Sites) -> dict[tuple[str, str], tuple[int, ...]]:
    return _shapes_of(jax.eval_shape(functools.partial(abstract, spec, sites)))


def _shapes_of(adapter: Adapter) -> dict[tuple[str, str], tuple[int, ...]]:
    return {
        (item, path): tuple(jnp.shape(leaf))
        for item in ("params", "constants")
        for path, leaf in paths_and_leaves(getattr(adapter, item))
    }
