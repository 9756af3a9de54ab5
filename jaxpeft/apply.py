"""Applies adapters to unmodified models, without forming W + ΔW.

The model is traced to a jaxpr with its plain weights; the jaxpr is then interpreted with adapted values in their place.
"""

import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from jaxpeft import checks, sharding
from jaxpeft.adapter import Adapter, by_path, check_base
from jaxpeft.blocks import Quantized, as_floats, is_quantized
from jaxpeft.interpret import evaluate
from jaxpeft.sites import Group, flatten, paths_and_leaves, with_leaves
from jaxpeft.spec import Spec
from jaxpeft.table import table
from jaxpeft.updates import Block, Decomposed, Dropout, PerShard, Update
from jaxpeft.values import Adapted, Use, recording, widened


@dataclass(frozen=True)
class Report:
    """How a model used each adapted weight: what `explain` returns; printing shows a table."""

    uses: tuple[tuple[Use, int], ...]

    @property
    def materialized(self) -> tuple[str, ...]:
        """Sites whose weight was formed somewhere."""
        return tuple(dict.fromkeys(use.site for use, _ in self.uses if not use.fused))

    @property
    def fused(self) -> tuple[str, ...]:
        """Sites that were used with their factors alone."""
        formed = set(self.materialized)
        return tuple(dict.fromkeys(use.site for use, _ in self.uses if use.site not in formed))

    def __str__(self) -> str:
        rows = [("site", "how", "by", "times")]
        for use, times in self.uses:
            rows.append((use.site, "fused" if use.fused else "materialised", use.primitive, str(times)))
        return "\n".join(table(rows))


class MaterializeWarning(UserWarning):
    """A weight had to be formed: correct, but it costs the time and memory that fusing saves."""


def adapt(fn: Callable, *, shardings: Any = None) -> Callable:
    """The function with adapters applied to its first argument.

    Args:
        fn: called as ``fn(base, *args, **kwargs)``; any JAX function of the parameters, e.g. a Linen ``apply``, or a
            function that merges an NNX module from its state. It is not changed, and the base is not copied.
        shardings: on a mesh, how the base lies on it: a tree of `NamedSharding` like the base, from
            `jaxpeft.sharding.of(base)` or the rules it was placed by. The factors then lie as the kernels do, and their
            gradients are summed once over the axes that split the batch alone. Not needed where axes are explicit.

    Returns:
        ``forward(base, adapter, *args, dropout_key=None, **kwargs)``, which returns what ``fn`` returns for the base
        with every adapted weight W replaced by W + ΔW. `adapter` is one `Adapter` or a list, whose updates add up.
        Given a `dropout_key`, adapters whose spec asks for dropout drop their inputs. Array arguments are traced, all
        others (flags, strings, sizes) stay as they are. Works under jit, grad, vmap, scan, remat and pmap.

    Raises:
        TypeError: at the call, if something else is given in an adapter's place.
        ValueError: at the call, if an adapter's arrays are not those of its spec and sites, or if an adapted weight is
            missing from the base, has another shape, or is never used by ``fn`` (it would train with zero gradient).

    Warns:
        MaterializeWarning: a weight is consumed by a primitive that has no rule, so W + ΔW is formed there.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import lora
        >>> base = {"up": {"kernel": jnp.ones((3, 4))}}
        >>> adapter = jaxpeft.init(jax.random.key(0), lora.Spec(rank=2), jaxpeft.find(base))
        >>> forward = jaxpeft.adapt(lambda base, x: x @ base["up"]["kernel"])
        >>> forward(base, adapter, jnp.ones((1, 3)))
        Array([[3., 3., 3., 3.]], dtype=float32)
    """
    on_mesh = sharding.flatten_shardings(shardings)

    def forward(
        base: Any, adapter: Adapter | Sequence[Adapter], *args: Any, dropout_key: Array | None = None, **kwargs: Any
    ) -> Any:
        adapters = checks.adapters(adapter)
        out, uses = _evaluate(fn, base, adapters, args, kwargs, dropout_key, on_mesh)
        if formed := Report(tuple(uses.items())).materialized:
            by = sorted({use.primitive for use in uses if not use.fused})
            warnings.warn(
                f"{len(formed)} adapted weights are formed by {', '.join(by)}, which has no fused rule: "
                f"{', '.join(formed[:5])}{', …' if len(formed) > 5 else ''}. See jaxpeft.explain.",
                MaterializeWarning,
                stacklevel=2,
            )
        return out

    # Not functools.wraps: it would lend fn's signature, which lacks the adapter, to jit's static_argnames.
    forward.__name__ = f"adapted_{getattr(fn, '__name__', 'function')}"
    return forward


def explain(fn: Callable, base: Any, adapter: Adapter | Sequence[Adapter], *args: Any, **kwargs: Any) -> Report:
    """Tells for each adapted weight whether ``fn`` computes with its factors or forms it, and by which primitive.

    Args:
        fn: the function that `adapt` takes.
        base: the parameters; `jax.ShapeDtypeStruct` leaves will do.
        adapter: the adapter or adapters.
        *args: what ``fn`` takes after the parameters; shapes will do for arrays.
        **kwargs: the same by keyword.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import lora
        >>> base = {"up": {"kernel": jnp.ones((3, 4))}}
        >>> adapter = jaxpeft.init(jax.random.key(0), lora.Spec(rank=2), jaxpeft.find(base))
        >>> print(jaxpeft.explain(lambda base, x: x @ base["up"]["kernel"], base, adapter, jnp.ones((1, 3))))
        site       how    by           times
        up/kernel  fused  dot_general  1
    """
    adapters = checks.adapters(adapter)
    dynamic, static, structure = _split_arrays((args, kwargs))
    reports = []

    def shapes_only(base: Any, adapters: list[Adapter], dynamic: list) -> Any:
        args, kwargs = _join_arrays(dynamic, static, structure)
        out, uses = _evaluate(fn, base, adapters, args, kwargs, None, {})
        reports.append(Report(tuple(uses.items())))
        return out

    jax.eval_shape(shapes_only, base, adapters, dynamic)
    return reports[0]


def _evaluate(
    fn: Callable,
    base: Any,
    adapters: Sequence[Adapter],
    args: tuple,
    kwargs: dict,
    dropout_key: Array | None,
    shardings: Mapping[str, NamedSharding],
) -> tuple[Any, Counter[Use]]:
    """What the adapted function returns, and how it used the weights."""
    shardings = shardings or sharding.explicit(base)
    values = _adapted_weights(flatten(base), adapters, dropout_key, shardings)
    dynamic, static, structure = _split_arrays((args, kwargs))

    def plain(base: Any, dynamic: list) -> Any:
        args, kwargs = _join_arrays(dynamic, static, structure)
        return fn(base, *args, **kwargs)

    leaves = paths_and_leaves(base)
    shapes = [as_floats(values[path].weight if path in values else leaf) for path, leaf in leaves]
    jaxpr, out_shape = jax.make_jaxpr(plain, return_shape=True)(with_leaves(base, shapes), dynamic)
    weights = [values.get(path) or (_quantized(path, leaf) if is_quantized(leaf) else leaf) for path, leaf in leaves]
    with recording() as uses:
        outputs = evaluate(jaxpr, [*weights, *jax.tree.leaves(dynamic)])
    used = {use.site for use in uses}
    if unused := [site for site in values if site not in used]:
        raise ValueError(
            f"{len(unused)} adapted weights are never used by this function and would train with zero gradient: "
            f"{', '.join(unused[:5])}{', …' if len(unused) > 5 else ''}; exclude them in jaxpeft.find"
        )
    return jax.tree.unflatten(jax.tree.structure(out_shape), outputs), uses


def _quantized(path: str, weight: Quantized) -> Adapted:
    """A frozen weight in few bits, as a value without updates."""
    layout = weight.layout.rjust(weight.ndim, "l")[-weight.ndim :]  # One that is vmapped has lost or gained an axis.
    return Adapted(weight, (), layout, tuple(range(weight.ndim)), path)


def _adapted_weights(
    leaves: dict[str, Any],
    adapters: Sequence[Adapter],
    dropout_key: Array | None,
    shardings: Mapping[str, NamedSharding],
) -> dict[str, Adapted]:
    """{path: value} over the sites of all adapters."""
    values: dict[str, Adapted] = {}
    for number, adapter in enumerate(adapters):
        check_base(adapter.sites, leaves)
        found = by_path(adapter, sharding.updates(adapter, shardings) if shardings else None)
        _check_outputs(found, leaves)
        for at, (path, (group, update)) in enumerate(found.items()):
            spec = adapter.spec.part(group)
            if dropout_key is not None and spec.dropout > 0:
                key = jax.random.fold_in(jax.random.fold_in(dropout_key, number), at)
                update = _with_dropout(update, jax.random.split(key, group.sizes("l")), spec, path)
            if path not in values:
                order = tuple(range(len(group.shape)))
                values[path] = Adapted(leaves[path], (), group.layout, order, path)
            elif values[path].layout != group.layout:
                raise ValueError(
                    f"two adapters disagree on the layout of {path}: {values[path].layout}, {group.layout}"
                )
            update = widened(update, leaves[path].dtype)
            values[path] = dataclasses.replace(values[path], updates=(*values[path].updates, update))
    return {path: _varying_alike(value) for path, value in values.items()}


def _varying_alike(value: Adapted) -> Adapted:
    """In `jax.shard_map`: a weight differs between devices where its updates do, and the model is traced with that."""
    varying = [jax.typeof(leaf).mat.varying for leaf in jax.tree.leaves(value)]
    axes = frozenset().union(*varying)

    def vary(leaf: Array) -> Array:
        missing = tuple(sorted(axes - jax.typeof(leaf).mat.varying))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(vary, value) if axes else value


def _check_outputs(found: Mapping[str, tuple[Group, Update]], leaves: Mapping[str, Any]) -> None:
    """An adapter behind a layer must sit at the last weight of that layer."""
    for path, (group, update) in found.items():
        bias = f"{path.rpartition('/')[0]}/bias"
        if update.on_output and "i" in group.layout and bias in leaves:
            raise ValueError(
                f"{path}: this adapter acts on the layer's output, but the layer adds {bias} after this weight; "
                f"select {bias} instead"
            )


def _with_dropout(update: Update, keys: Array, spec: Spec, path: str) -> Update:
    """The update with dropout, on the inside of what wraps it."""
    if isinstance(update, PerShard) and (isinstance(update.update, Decomposed | Block) or spec.dropout_on == "factors"):
        # Factors drop the same on every shard; of what is dropped inside the update each shard draws its own.
        shards = jax.tree.leaves(update)[0].shape[keys.ndim]
        own = jax.vmap(lambda shard: keys if spec.dropout_on == "factors" else _folded(keys, shard), out_axes=-1)
        inner = _with_dropout(update.update, own(jnp.arange(shards)), spec, path)
        return dataclasses.replace(update, update=inner)
    if isinstance(update, Decomposed | Block):
        return dataclasses.replace(update, update=_with_dropout(update.update, keys, spec, path))
    if not update.additive:
        raise ValueError(
            f"dropout={spec.dropout} at {path}: a {type(update).__name__} multiplies the weight itself and has no "
            "product of its own to drop; use dropout=0, or call without dropout_key"
        )
    return Dropout(update, keys, spec.dropout, spec.dropout_on, spec.dropout_pattern)


def _folded(keys: Array, number: Array | int) -> Array:
    """`jax.random.fold_in` for an array of keys."""
    return jnp.vectorize(jax.random.fold_in)(keys, number)


def _split_arrays(tree: Any) -> tuple[list, list, Any]:
    """Array leaves (None elsewhere), all other leaves (None at arrays), and the structure."""
    leaves, structure = jax.tree.flatten(tree)
    is_array = [isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct) for leaf in leaves]
    dynamic = [leaf if at else None for leaf, at in zip(leaves, is_array, strict=True)]
    static = [None if at else leaf for leaf, at in zip(leaves, is_array, strict=True)]
    return dynamic, static, structure


def _join_arrays(dynamic: list, static: list, structure: Any) -> Any:
    leaves = [kept if leaf is None else leaf for leaf, kept in zip(dynamic, static, strict=True)]
    return jax.tree.unflatten(structure, leaves)
