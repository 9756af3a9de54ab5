"""Merging: a new parameter tree with the updates added in, and what the cast to the base's dtype loses."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxpeft import checks
from jaxpeft.adapter import Adapter, by_path, check_base
from jaxpeft.blocks import Quantized, is_quantized
from jaxpeft.layout import from_matrix, to_matrix
from jaxpeft.sites import Group, flatten, paths_and_leaves, with_leaves
from jaxpeft.updates import Update
from jaxpeft.values import materialize, over_stack, widened, working_dtype


@dataclass(frozen=True)
class MergeReport:
    """What one cast to the base's dtype loses.

    Attributes:
        largest_error: {path: max |merged - (W + ΔW)|}.
        lost: {path: ‖merged - (W + ΔW)‖ / ‖ΔW‖}, the share of the update that rounding drowns; 0 if ΔW is zero.
    """

    largest_error: dict[str, float]
    lost: dict[str, float]

    def __str__(self) -> str:
        error, share = max(self.largest_error.values()), max(self.lost.values())
        at = max(self.lost, key=self.lost.__getitem__)
        return f"merged {len(self.lost)} arrays: largest rounding error {error:.2e}, at most {share:.2%} of ΔW ({at})"


def merge(base: Any, adapter: Adapter | Sequence[Adapter], *, dequantize: bool = False) -> Any:
    """The base with every adapted weight W replaced by W + ΔW, computed in float32 or wider and cast once.

    Args:
        base: the base parameters; they stay as they are. Undoing a merge is keeping them.
        adapter: one adapter, or several, whose updates add up.
        dequantize: whether adapted weights in few bits may become floats, of the type they were quantized from.

    Returns:
        A new tree of the same structure, shapes and dtypes; arrays that are not adapted are shared with the base.

    Raises:
        ValueError: the base lacks an adapted weight, or it has another shape, or is in few bits: quantizing W + ΔW
            anew would drown most of ΔW.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import lora
        >>> base = {"up": {"kernel": jnp.ones((3, 4))}}
        >>> adapter = jaxpeft.init(jax.random.key(0), lora.Spec(rank=2), jaxpeft.find(base))
        >>> bool((jaxpeft.merge(base, adapter)["up"]["kernel"] == base["up"]["kernel"]).all())
        True
    """
    return _merge(base, adapter, dequantize)[0]


def merge_with_report(
    base: Any, adapter: Adapter | Sequence[Adapter], *, dequantize: bool = False
) -> tuple[Any, MergeReport]:
    """`merge`, and the error of its cast, measured against what was computed; not under jit."""
    merged, errors = _merge(base, adapter, dequantize)
    errors = {path: (float(largest), float(lost)) for path, (largest, lost) in jax.device_get(errors).items()}
    report = MergeReport(
        largest_error={path: largest for path, (largest, _) in errors.items()},
        lost={path: lost for path, (_, lost) in errors.items()},
    )
    return merged, report


def _merge(
    base: Any, adapter: Adapter | Sequence[Adapter], dequantize: bool
) -> tuple[Any, dict[str, tuple[Array, Array]]]:
    """The merged tree, and {path: (largest error, lost share)}."""
    leaves, changes = flatten(base), changed(base, adapter)
    quantized = [path for path in changes if is_quantized(leaves[path])]
    if quantized and not dequantize:
        raise ValueError(
            f"{len(quantized)} adapted weights are in few bits: {', '.join(quantized[:5])}"
            f"{', …' if len(quantized) > 5 else ''} ({leaves[quantized[0]].kind}). Rounded to them again, W + ΔW would "
            "lose most of ΔW. Keep the adapter beside the base, or pass dequantize=True for float weights there"
        )
    merged = {path: _merge_one(group, leaves[path], updates) for path, (group, updates) in changes.items()}
    tree = [merged[path][0] if path in merged else leaf for path, leaf in paths_and_leaves(base)]
    return with_leaves(base, tree), {path: errors for path, (_, errors) in merged.items()}


def changed(base: Any, adapter: Adapter | Sequence[Adapter]) -> dict[str, tuple[Group, tuple[Update, ...]]]:
    """{path: (group, updates)} of every weight that the adapters change; a ValueError if the base lacks one."""
    leaves = flatten(base)
    changes: dict[str, tuple[Group, tuple[Update, ...]]] = {}
    for one in checks.adapters(adapter):
        check_base(one.sites, leaves)
        for path, (group, update) in by_path(one).items():
            update = widened(update, leaves[path].dtype)
            changes[path] = group, (*changes.get(path, (group, ()))[1], update)
    return changes


def merged_matrix(layout: str, weight: Array | Quantized, updates: tuple[Update, ...]) -> Array:
    """W + Σ ΔW of one array as (*stack, in, out), float32 or in the array's own dtype where that is wider."""
    frozen = to_matrix(weight, layout).astype(working_dtype(weight.dtype))
    return over_stack(materialize, layout.count("l"))(updates, frozen)


@partial(jax.jit, static_argnums=0)
def _merge_one(
    group: Group, weight: Array | Quantized, updates: tuple[Update, ...]
) -> tuple[Array, tuple[Array, Array]]:
    frozen = to_matrix(weight, group.layout).astype(working_dtype(weight.dtype))
    exact = merged_matrix(group.layout, weight, updates)
    merged = exact.astype(weight.dtype)
    error, change = merged.astype(exact.dtype) - exact, jnp.linalg.norm(exact - frozen)
    lost = jnp.linalg.norm(error) / jnp.where(change > 0, change, jnp.inf)
    return from_matrix(merged, group.layout, group.shape), (jnp.abs(error).max(), lost)
