"""How an adapter lies on a mesh: everything is derived from how the base's weights lie on it.

A factor is split as the side of the kernel that it multiplies, its rank never; what factors are made of (pools, chunks,
vectors) is whole on every device, and each device assembles from it just its own part of the factors.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxpeft.adapter import Adapter
from jaxpeft.blocks import is_quantized
from jaxpeft.layout import axes as axes_of
from jaxpeft.quantize import shardings as of_blocks
from jaxpeft.selection import nearest_paths
from jaxpeft.sites import Group, flatten, paths_and_leaves, with_leaves
from jaxpeft.updates import PerShard, Update

Rules = Sequence[tuple[str, PartitionSpec]]
"""(regular expression over the "/"-joined path, `PartitionSpec`) pairs; the first that is found in a path counts."""

BATCH = ("data", "fsdp")
"""The mesh axes that split the batch. Where they split no factor, its gradients are summed over them once a step."""


def of(base: Any) -> Any:
    """The sharding of every array of a tree, as a tree; arrays and `jax.ShapeDtypeStruct`s that have one.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> of({"up": {"kernel": jnp.ones((3, 4))}})["up"]["kernel"].is_fully_replicated
        True
    """
    return jax.tree.map(lambda leaf: leaf.sharding, base)


def from_rules(params: Any, mesh: Mesh, rules: Rules, *, strict: bool = True) -> Any:
    """The sharding of every array of a tree by a list of rules.

    Args:
        params: any pytree of arrays or `jax.ShapeDtypeStruct`s.
        mesh: the devices. Axes that a rule names and the mesh lacks are left out.
        rules: tried in order on the path; an array that none fits is whole on every device.
        strict: whether an axis whose size a rule does not divide is an error; otherwise it is left whole.

    Returns:
        A tree of `NamedSharding`, for `jax.device_put`, for ``in_shardings`` and for `jaxpeft.adapt`.

    Raises:
        ValueError: the rules fit nothing (with the nearest paths), have more axes than an array, or do not divide it.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jax.sharding import PartitionSpec as P
        >>> mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"))
        >>> from_rules({"kernel": jnp.ones((3, 4))}, mesh, [("kernel", P("fsdp", "tensor"))])["kernel"].spec
        P('fsdp', 'tensor')
    """
    leaves = paths_and_leaves(params)
    patterns = [pattern for pattern, spec in rules if any(spec)]
    if patterns and not any(re.search(pattern, path) for pattern in patterns for path, _ in leaves):
        near = nearest_paths(patterns[0], dict(leaves))
        raise ValueError(f"no sharding rule that splits anything fits an array of this tree; {patterns[0]!r}: {near}")
    placed = [_by_rules(path, tuple(leaf.shape), mesh, rules, strict) for path, leaf in leaves]
    arrays = [
        of_blocks(leaf, sharding) if is_quantized(leaf) else sharding
        for (_, leaf), sharding in zip(leaves, placed, strict=True)
    ]
    return with_leaves(params, arrays)


def _by_rules(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules, strict: bool) -> NamedSharding:
    spec = next((spec for pattern, spec in rules if re.search(pattern, path)), PartitionSpec())
    if len(spec) > len(shape):
        raise ValueError(f"{path} has shape {shape}, but its sharding rule {spec} has {len(spec)} axes")
    names = [_names(entry, mesh) for entry in spec]
    for axis, size in enumerate(shape[: len(spec)]):
        if size % (parts := _parts(names[axis], mesh)):
            if strict:
                raise ValueError(
                    f"{path}: axis {axis} of shape {shape} cannot be split into {parts} parts over {names[axis]}; "
                    f"use a mesh whose axes divide {size}, or another sharding rule"
                )
            names[axis] = ()
    return NamedSharding(mesh, _spec(names))


def adapter(of: Adapter, shardings: Any) -> Adapter:
    """How an adapter is stored on the mesh of its base.

    What is an update's factor as it stands (LoRA's a and b, a weight trained whole) is split like the side of the
    kernel that it belongs to. All other arrays, pools and index tables among them, are whole on every device.

    Args:
        of: an adapter, or its shapes from `jax.eval_shape`.
        shardings: of the base, a tree like it; `of` or `from_rules` makes one.

    Returns:
        An adapter of `NamedSharding`s, e.g. for ``jax.device_put(adapter, jaxpeft.sharding.adapter(adapter, …))``.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jax.sharding import PartitionSpec as P
        >>> from jaxpeft.methods import lora
        >>> mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"))
        >>> base = {"up": {"kernel": jnp.ones((3, 4))}}
        >>> made = jaxpeft.init(jax.random.key(0), lora.Spec(rank=2), jaxpeft.find(base))
        >>> by_kernel = jaxpeft.sharding.from_rules(base, mesh, [("kernel", P("fsdp", "tensor"))])
        >>> placed = jaxpeft.sharding.adapter(made, by_kernel)
        >>> placed.params["up/kernel"]["a"].spec, placed.params["up/kernel"]["b"].spec
        (P(None, None, 'fsdp'), P(None, None, 'tensor'))
    """
    at = flatten_shardings(shardings)
    mesh, expansion = mesh_of(at), _expansion(of, at)
    leaves, structure = jax.tree.flatten((of.params, of.constants))
    specs = [PartitionSpec()] * len(leaves)
    for output in expansion.outputs:
        if output.kept is not None:
            specs[output.kept] = output.spec
    params, constants = jax.tree.unflatten(structure, [NamedSharding(mesh, spec) for spec in specs])
    return of.replace(params=params, constants=constants)


def like(tree: Any, params: Any, shardings: Any) -> Any:
    """How an optimiser's state is stored: what mirrors a trained array lies as that does, counters are whole.

    Args:
        tree: the state, or its shapes from ``jax.eval_shape(optimizer.init, params)``.
        params: the trained arrays, or their shapes.
        shardings: theirs, a tree like `params`, e.g. ``jaxpeft.sharding.adapter(…).params``.

    Returns:
        A tree like `tree` of `NamedSharding`s.
    """
    known = {path: leaf.shape for path, leaf in paths_and_leaves(params)}
    placed = dict(paths_and_leaves(shardings))
    whole = NamedSharding(next(iter(placed.values())).mesh, PartitionSpec())

    def place(path: str, leaf: Any) -> NamedSharding:
        # The longest: of `up` and `mlp/up`, a moment of the latter ends with both.
        mirrored = max((name for name in known if f"/{path}".endswith(f"/{name}")), key=len, default=None)
        return whole if mirrored is None or known[mirrored] != leaf.shape else placed.get(mirrored, whole)

    found = [place(path, leaf) for path, leaf in paths_and_leaves(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), found)


def shapes(tree: Any, shardings: Any) -> Any:
    """The shapes of a tree as `jax.ShapeDtypeStruct`, laid out as a tree of shardings says; without memory."""
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), tree, shardings)


def whole(leaf: Any) -> np.ndarray:
    """The values of an array, on every process, also where its parts lie on several; all of them must ask."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if isinstance(leaf, Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def flatten_shardings(shardings: Any) -> dict[str, NamedSharding]:
    """{path: sharding} of those leaves of a tree that lie on a mesh; a weight in few bits lies as its codes do."""
    found = {path: leaf.codes if is_quantized(leaf) else leaf for path, leaf in paths_and_leaves(shardings)}
    return {path: leaf for path, leaf in found.items() if isinstance(leaf, NamedSharding)}


def explicit(base: Any) -> dict[str, NamedSharding]:
    """{path: sharding} of the arrays whose type says how they lie, as on a mesh of explicit axes."""
    leaves = {path: leaf.codes if is_quantized(leaf) else leaf for path, leaf in flatten(base).items()}
    found = {path: jax.typeof(leaf).sharding for path, leaf in leaves.items()}
    return {path: at for path, at in found.items() if AxisType.Explicit in at.mesh.axis_types}


def mesh_of(shardings: Mapping[str, NamedSharding]) -> Any:
    """The mesh that all shardings are on.

    Raises:
        ValueError: there is none, or there are several.
    """
    meshes = {sharding.mesh for sharding in shardings.values()}
    if len(meshes) != 1:
        raise ValueError(f"the shardings of a base must be `NamedSharding`s on one mesh, found {len(meshes)} meshes")
    return meshes.pop()


def updates(of: Adapter, shardings: Mapping[str, NamedSharding]) -> dict[str, Update]:
    """`Adapter.updates` on a mesh: every device expands its own part of the factors, and the parts fit the kernels.

    Over the axes that split the batch but not the factors, each device gets a copy of its own (`PerShard`): the
    gradients that its share of the batch gives stay its own until they have been brought back to the trained arrays,
    and are then summed once. A pool's gradient is as large as the pool, where a factor's would be as large as LoRA's.

    Args:
        of: the adapter.
        shardings: {path: sharding} of the base.
    """
    mesh, expansion = mesh_of(shardings), _expansion(of, shardings)
    inputs, structure = jax.tree.flatten((of.params, of.constants))
    # A mesh of explicit axes is the context's.
    where = None if AxisType.Explicit in mesh.axis_types or not isinstance(mesh, Mesh) else mesh
    outputs = expansion.outputs
    computed = [at for at, output in enumerate(outputs) if output.kept is None]

    def expand(inputs: list) -> list[Array]:
        params, constants = jax.tree.unflatten(structure, inputs)
        whole = jax.tree.leaves(of.replace(params=params, constants=constants).updates())
        mine = [_own_part(whole[at], outputs[at].spec, mesh) for at in computed]
        return [leaf[:, None] if outputs[at].copies else leaf for at, leaf in zip(computed, mine, strict=True)]

    made: dict[int, Array] = {}
    if computed:
        # Every device computes, from arrays that are whole: the only collective is the sum of their gradients.
        out_specs = [outputs[at].with_copies for at in computed]
        on_each = jax.shard_map(expand, mesh=where, in_specs=PartitionSpec(), out_specs=out_specs, check_vma=False)
        unused = {output.kept for output in outputs}
        parts = on_each([jnp.zeros(x.shape, x.dtype) if at in unused else x for at, x in enumerate(inputs)])
        made |= zip(computed, parts, strict=True)
    for at, output in enumerate(outputs):
        if output.kept is not None:
            leaf = inputs[output.kept]
            if output.copies:
                copies = _parts(output.copies, mesh)
                leaf = jnp.broadcast_to(leaf[:, None], (leaf.shape[0], copies, *leaf.shape[1:]))
            made[at] = _laid_out(leaf, NamedSharding(mesh, output.with_copies))
    updates = jax.tree.unflatten(expansion.structure, [made[at] for at in range(len(outputs))])
    copied = expansion.copies
    return {name: PerShard(one, where, copied[name]) if copied[name] else one for name, one in updates.items()}


@dataclass(frozen=True)
class _Output:
    """One array of an update.

    Attributes:
        spec: how it lies.
        copies: the mesh axes over which there is a copy for each device.
        kept: the number of the input that it is as it stands, if that serves for nothing else: such an input is stored
            as the kernel wants it.
    """

    spec: PartitionSpec
    copies: tuple[str, ...]
    kept: int | None

    @property
    def with_copies(self) -> PartitionSpec:
        """How the copies lie, which follow the layers."""
        return PartitionSpec(self.spec[0], self.copies, *self.spec[1:]) if self.copies else self.spec


@dataclass(frozen=True)
class _Expansion:
    """What becomes of an adapter's arrays in its updates: their structure, arrays, and copies by group."""

    structure: Any
    outputs: list[_Output]
    copies: dict[str, tuple[str, ...]]


def _expansion(of: Adapter, shardings: Mapping[str, NamedSharding]) -> _Expansion:
    def expand(params: Any, constants: Any) -> dict[str, Update]:
        return of.replace(params=params, constants=constants).updates()

    mesh = mesh_of(shardings)
    traced, shapes = jax.make_jaxpr(expand, return_shape=True)(of.params, of.constants)
    jaxpr = traced.jaxpr
    used = {atom for equation in jaxpr.eqns for atom in equation.invars if isinstance(atom, jex.Var)}
    alone = {atom: at for at, atom in enumerate(jaxpr.invars) if atom not in used}
    outvars, outputs, copies = iter(jaxpr.outvars), [], {}
    for name in sorted(shapes):  # As the arrays of a dict are ordered.
        group = of.sites[name]
        kernel = shardings.get(group.paths[0], NamedSharding(mesh, PartitionSpec()))
        specs = jax.tree.leaves(_of_update(shapes[name], *_sides(group, kernel)))
        # A lone vector beside arrays that are whole is small enough to be whole as well: then all have copies.
        counted = [spec if len(spec) > 2 else spec[:1] for spec in specs]
        split = {axis for spec in counted for entry in spec for axis in _names(entry, mesh)}
        # A vector has no product that its copies could serve, unless they act on what a layer gives out.
        served = BATCH if "i" in group.layout or shapes[name].on_output else ()
        copies[name] = tuple(axis for axis in served if mesh.shape.get(axis, 1) > 1 and axis not in split)
        for spec in specs:
            kept = [tuple(axis for axis in _names(entry, mesh) if axis not in copies[name]) for entry in spec]
            spec, atom = _spec(kept), next(outvars)
            outputs.append(_Output(spec, copies[name], alone.get(atom) if isinstance(atom, jex.Var) else None))
    return _Expansion(jax.tree.structure(shapes), outputs, copies)


def _sides(group: Group, sharding: NamedSharding) -> tuple[Any, tuple[str, ...], dict[str, tuple[str, ...]]]:
    """The mesh, and the mesh axes of a group's layers and of its flattened in and out sides."""
    entries = [*sharding.spec, *[None] * (len(group.shape) - len(sharding.spec))]

    def side(letter: str) -> tuple[str, ...]:
        first, *others = [_names(entries[axis], sharding.mesh) for axis in axes_of(group.layout, letter)] or [()]
        # A flattened side is cut into runs only if no axis but its first is cut.
        return () if any(others) else first

    whole = len(group.paths) == 1 and group.entries is None
    return sharding.mesh, side("l") if whole else (), {letter: side(letter) for letter in "io"}


def _of_update(update: Update, mesh: Any, lead: tuple[str, ...], sides: Mapping[str, tuple[str, ...]]) -> Update:
    """An update with the spec of each array in its place."""

    def spec(leaf: Any, letters: str) -> PartitionSpec:
        known = len(letters) == leaf.ndim - 1
        names = [lead, *(sides.get(letter, ()) if known else () for letter in letters.ljust(leaf.ndim - 1))]
        return _spec([() if size % _parts(at, mesh) else at for at, size in zip(names, leaf.shape, strict=False)])

    placed = {}
    for field in dataclasses.fields(update):  # pyright: ignore[reportArgumentType], updates are dataclasses
        value, letters = getattr(update, field.name), type(update).axes.get(field.name, "")
        if isinstance(value, Update):
            placed[field.name] = _of_update(value, mesh, lead, sides if letters else {})
        elif not field.metadata.get("static"):
            placed[field.name] = jax.tree.map(lambda leaf, letters=letters: spec(leaf, letters), value)
    return dataclasses.replace(update, **placed)  # pyright: ignore[reportArgumentType]


def _own_part(leaf: Array, spec: PartitionSpec, mesh: Any) -> Array:
    """This device's part of an array that it has whole."""
    for axis, entry in enumerate(spec):
        if names := _names(entry, mesh):
            size = leaf.shape[axis] // _parts(names, mesh)
            leaf = jax.lax.dynamic_slice_in_dim(leaf, jax.lax.axis_index(names) * size, size, axis)
    return leaf


def _laid_out(leaf: Array, sharding: NamedSharding) -> Array:
    if AxisType.Explicit in sharding.mesh.axis_types:
        return jax.sharding.reshard(leaf, sharding)
    return jax.lax.with_sharding_constraint(leaf, sharding)


def _names(entry: Any, mesh: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a `PartitionSpec`, without those that the mesh lacks."""
    names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
    return tuple(name for name in names if name in mesh.axis_names)


def _parts(names: Sequence[str], mesh: Any) -> int:
    return math.prod(mesh.shape[name] for name in names)


def _spec(names: Sequence[tuple[str, ...]]) -> PartitionSpec:
    return PartitionSpec(*(at[0] if len(at) == 1 else at or None for at in names))
