"""An adapter: its trained and its frozen arrays, apart from each other and from the base, with the spec and sites."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpeft import switches
from jaxpeft.layout import from_matrix, to_matrix
from jaxpeft.selection import nearest_paths
from jaxpeft.sites import Group, Sites, flatten
from jaxpeft.spec import Spec, alpha_of, check_kinds, kind_of, method_of, name_of
from jaxpeft.table import html_table
from jaxpeft.updates import Update
from jaxpeft.values import over_stack, widened, working_dtype
from jaxpeft.weights import Weights


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapter:
    """What `init` makes and everything else takes; a pytree.

    Printing tells the method, the groups and the number of parameters, not the arrays; a notebook shows a table.

    Attributes:
        params: {group: {name: array}}, trained. Differentiate with respect to these alone. What belongs to all groups
            together is under ``shared``.
        constants: the same, frozen: index tables, and every group's ``scale`` (L,).
        spec: the method's hyper-parameters.
        sites: the adapted weights.
    """

    params: dict[str, dict[str, Any]]
    constants: dict[str, dict[str, Any]]
    spec: Spec = dataclasses.field(metadata={"static": True})
    sites: Sites = dataclasses.field(metadata={"static": True})

    def __repr__(self) -> str:
        changed = [
            f"{field.name}={value!r}"
            for field in dataclasses.fields(self.spec)
            if (value := getattr(self.spec, field.name)) != field.default
        ]
        method = f"{name_of(self.spec)}({', '.join(changed)})"
        groups = f"{len(self.sites)} group{'' if len(self.sites) == 1 else 's'}"
        return f"Adapter({method}, {groups}, {_counted(self.params)})"

    def _repr_html_(self) -> str:
        rows: list[tuple[str, ...]] = [("group", "layers", "in", "out", "trained", "parameters")]
        for name, leaves in self.params.items():
            group = next((group for group in self.sites if group.name == name), None)
            sizes = ("", "", "") if group is None else (group.layers, group.in_dim, group.out_dim)
            arrays = flatten(leaves)
            shapes = ", ".join(f"{leaf} {'x'.join(map(str, array.shape))}" for leaf, array in arrays.items())
            rows.append((name, *map(str, sizes), shapes, f"{sum(array.size for array in arrays.values()):,}"))
        return html_table(rows, repr(self))

    def replace(self, **changes: Any) -> Self:
        """A copy with other fields."""
        return dataclasses.replace(self, **changes)

    def with_alpha(self, alpha: float) -> Self:
        """A copy with another alpha. Nothing that is compiled for the adapter is compiled again."""
        spec, constants = dataclasses.replace(self.spec, alpha=alpha), dict(self.constants)
        for group in self.sites:
            own = constants[group.name]
            constants[group.name] = {**own, "scale": jnp.full_like(own["scale"], spec.scale(group))}
        return self.replace(spec=spec, constants=constants)

    @property
    def alpha(self) -> float:
        """Alpha as the arrays have it.

        Specs that differ in alpha alone are equal, so `jax.jit`, which keeps what it has compiled for one, returns that
        one's spec with the arrays of others; `spec.alpha` may be of another adapter.
        """
        for group in self.sites:
            scale = np.asarray(self.constants[group.name]["scale"]).flat[0]
            if scale != np.float32(self.spec.scale(group)):
                return alpha_of(float(scale), self.spec.alpha / self.spec.scale(group))
        return self.spec.alpha

    def updates(self) -> dict[str, Update]:
        """{group: update}, every array stacked over the group's L layers. Differentiable in `params`."""
        updates = method_of(self.spec).updates(self.params, self.constants, self.spec, self.sites)
        return switches.wrap(updates, self.params, self.constants, self.spec, self.sites)


def _counted(params: Any) -> str:
    """How many parameters; a tree may also hold what is no array, for instance where the arrays lie."""
    leaves = jax.tree.leaves(params)
    arrays = all(hasattr(leaf, "size") for leaf in leaves)
    return f"{sum(leaf.size for leaf in leaves):,} trained parameters" if arrays else "no arrays"


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> Adapter:
    """A new adapter.

    Args:
        key: `jax.random.key`; every group draws from its own.
        spec: the method's hyper-parameters, e.g. `jaxpeft.methods.mos.Spec(…)`.
        sites: the weights to adapt, from `find`.
        weights: the base parameters, for methods and switches whose start reads them; the others ignore them.

    Returns:
        The adapter: float32 trained arrays, frozen arrays, and ΔW = 0 unless the method says otherwise.

    Raises:
        TypeError: the spec or the sites are something else.
        ValueError: the spec does not fit a site; the message names the nearest value that does.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import lora
        >>> params = {"q_proj": {"kernel": jnp.zeros((64, 32))}}
        >>> adapter = jaxpeft.init(jax.random.key(0), lora.Spec(rank=4), jaxpeft.find(params))
        >>> jaxpeft.count(adapter)
        384
    """
    check_kinds(spec, sites)
    for group in sites:
        part = spec.part(group)
        if "i" not in group.layout and not method_of(part).CARD.vectors:
            name = name_of(part)
            raise ValueError(f"{group.name} is a vector, which {name} cannot adapt; exclude it, or train it as it is")
    method, frozen = method_of(spec), None if weights is None else Weights(weights, sites)
    if frozen is not None:
        check_base(sites, frozen.leaves)
    # A method leaves the types to JAX: this way a key gives the same float32 and int32 arrays with x64 and without.
    with jax.enable_x64(False):
        params, constants = method.init(key, spec, sites, frozen)
        for group in sites:
            constants[group.name]["scale"] = jnp.full(group.layers, spec.scale(group), jnp.float32)
        params, constants = switches.start(params, constants, spec, sites, frozen)
    if any(spec.part(group).dora for group in sites):  # Expanding the updates is work that no other start needs.
        updates = method.updates(params, constants, spec, sites)
        params = switches.magnitudes(params, constants, updates, spec, sites, frozen)
    return Adapter(params, constants, spec, sites)


def abstract(spec: Spec, sites: Sites) -> Adapter:
    """An adapter for its shapes, under `jax.eval_shape`: a start that reads the weights is given zeros."""
    weights = {path: jnp.zeros(group.shape, jnp.float32) for group in sites for path in group.paths}
    return init(jax.random.key(0), spec, sites, weights)


def check_one(given: Any) -> None:
    """Raises TypeError unless it is one adapter."""
    if not isinstance(given, Adapter):
        raise TypeError(f"expected an adapter, found {kind_of(given)}")


def count(adapter: Adapter) -> int:
    """Number of trained parameters; a shared pool counts once."""
    check_one(adapter)
    return sum(leaf.size for leaf in jax.tree.leaves(adapter.params))


def delta(adapter: Adapter, base: Any = None) -> dict[str, Array]:
    """The update of every adapted weight, as a dense array.

    Args:
        adapter: any adapter.
        base: the base parameters; needed by updates that depend on the weight they change.

    Returns:
        {path: ΔW}, float32 or as wide as the base, in the kernel's own shape: stacked as the kernel is, zero in layers
        that are not adapted.
    """
    weights = {} if base is None else flatten(base)
    deltas = {}
    for path, (group, update) in by_path(adapter).items():
        if weights:
            weight = to_matrix(weights[path], group.layout).astype(working_dtype(weights[path].dtype))
        elif update.additive:
            weight = jnp.zeros((*group.sizes("l"), group.in_dim, group.out_dim), jnp.float32)
        else:
            raise ValueError(f"the update of {path} depends on the weight it changes; pass base=")
        update = widened(update, weight.dtype)
        changed = over_stack(type(update).materialize, len(group.sizes("l")))(update, weight)
        deltas[path] = from_matrix((changed - weight).astype(weight.dtype), group.layout, group.shape)
    return deltas


def by_path(adapter: Adapter, updates: Mapping[str, Update] | None = None) -> dict[str, tuple[Group, Update]]:
    """{path: (group, update)}; the update's arrays lead with the array's stack axes, in their order.

    An array that is adapted in some layers only gets zeros in the others. `updates` are the adapter's own by default.
    """
    found = {}
    for name, update in (adapter.updates() if updates is None else updates).items():
        group = adapter.sites[name]
        leaves, structure = jax.tree.flatten(update)
        # A split, because its transpose is one concatenation where L slices would each add a full-size array.
        columns = [
            [leaf] * len(group.paths)
            if len(leaf) == 1
            else jax.lax.split(leaf, [len(leaf) // len(group.paths)] * len(group.paths))
            for leaf in leaves
        ]
        for path, parts in zip(group.paths, zip(*columns, strict=True), strict=True):
            whole = [_over_stack_axes(part, group) for part in parts]
            found[path] = group, jax.tree.unflatten(structure, whole)
    return found


def _over_stack_axes(leaf: Array, group: Group) -> Array:
    """An update's array at one path: its layers as the stack axes, with zeros for those that are not adapted."""
    if len(leaf) == 1 < group.layers // len(group.paths):
        return leaf.reshape(*(1,) * len(group.stack), *leaf.shape[1:])
    leaf = leaf.reshape(*group.stack, *leaf.shape[1:])
    if group.entries is None:
        return leaf
    size = group.sizes("l")[0]
    return jnp.zeros((size, *leaf.shape[1:]), leaf.dtype).at[jnp.asarray(group.entries)].set(leaf)


def check_base(sites: Sites, leaves: Mapping[str, Any]) -> None:
    """Raises ValueError unless every site is an array of the base, of the shape it was found with."""
    for group in sites:
        for path in group.paths:
            if path not in leaves:
                raise ValueError(f"the base has no array {path!r} to adapt; {nearest_paths(path, leaves)}")
            if (shape := tuple(leaves[path].shape)) != group.shape:
                raise ValueError(f"{path} has shape {shape} in this base; the adapter was made for {group.shape}")
