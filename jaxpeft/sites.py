"""Where an adapter acts: the weights of a parameter tree that it adapts, grouped by module type over the layers."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.blocks import as_floats, is_quantized
from jaxpeft.layout import sizes
from jaxpeft.names import StackedTrees, is_head, is_linear, layout_by_name
from jaxpeft.selection import ALL_LINEAR, Selection, compile_pattern, module_type, nearest_paths, select
from jaxpeft.table import html_table, table
from jaxpeft.usage import Usage, usage


@dataclass(frozen=True)
class Group:
    """The adapted weights of one module type, over all layers.

    A layout is a string with one letter for every axis of the array: ``i`` an input axis, ``o`` an output axis, ``l``
    an axis that stacks layers or experts. A Dense kernel is ``io``, GPT-2's ``oi``, an attention query kernel
    (embed, heads, head_dim) ``ioo``, a scanned Dense kernel ``lio``. A vector (a bias, a norm's scale) is ``o``, a
    weight of one input.

    Attributes:
        name: path of the weight with the layer's number as ``*``; the key of the group in an adapter's trees.
        paths: one path for every layer of an unrolled model, or the single path of a stacked array.
        shape: shape of the array at each path, stack axes included.
        layout: one letter for every axis of `shape`.
        entries: the entries of the first stack axis that are adapted; None for all of them.
    """

    name: str
    paths: tuple[str, ...]
    shape: tuple[int, ...]
    layout: str
    entries: tuple[int, ...] | None = None

    def sizes(self, letter: str) -> tuple[int, ...]:
        """Sizes of the axes that carry `letter`, in the array's order."""
        return sizes(self.shape, self.layout, letter)

    @property
    def in_dim(self) -> int:
        """Input features of one weight, its in-axes flattened."""
        return math.prod(self.sizes("i"))

    @property
    def out_dim(self) -> int:
        """Output features of one weight, its out-axes flattened."""
        return math.prod(self.sizes("o"))

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the leading axes of an update at one path: the stack axes, of the first only the adapted entries."""
        stack = self.sizes("l")
        return stack if self.entries is None else (len(self.entries), *stack[1:])

    @property
    def layers(self) -> int:
        """Number L of adapted (in, out) weights: over the paths and, in each, over the stack axes in their order."""
        return len(self.paths) * math.prod(self.stack)


@dataclass(frozen=True)
class Sites:
    """The groups of adapted weights; what `find` returns. Iterates over its groups; printing shows a table."""

    groups: tuple[Group, ...]

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, name: str) -> Group:
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(f"no group {name!r}; {nearest_paths(name, [group.name for group in self.groups])}")

    @property
    def size(self) -> int:
        """Number of base parameters that the sites hold."""
        return sum(group.layers * group.in_dim * group.out_dim for group in self)

    def __str__(self) -> str:
        rows, total = self._table()
        return "\n".join([*table(rows), total])

    def _repr_html_(self) -> str:
        return html_table(*self._table())

    def _table(self) -> tuple[list[tuple[str, ...]], str]:
        rows = [("group", "layers", "in", "out", "layout", "shape")]
        for g in self:
            shape = "x".join(map(str, g.shape))
            rows.append((g.name, str(g.layers), str(g.in_dim), str(g.out_dim), g.layout, shape))
        return rows, f"{sum(g.layers for g in self)} weights, {self.size:,} base parameters"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description, read back by `from_dict`."""
        return {"groups": [dataclasses.asdict(group) for group in self]}

    @classmethod
    def from_dict(cls, description: Mapping[str, Any]) -> "Sites":
        """The sites that `to_dict` described."""

        def group(fields: Mapping[str, Any]) -> Group:
            tuples: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
            return Group(**tuples)

        return cls(tuple(group(fields) for fields in description["groups"]))


def find(
    params: Any,
    selection: Selection = ALL_LINEAR,
    *,
    exclude: Selection | None = None,
    layers: Iterable[int] | None = None,
    layouts: Mapping[str, str] | None = None,
    model: Callable[[Any], Any] | None = None,
) -> Sites:
    r"""Finds the weights to adapt and groups them by module type over the layers.

    Args:
        params: any pytree of arrays or `jax.ShapeDtypeStruct`: Linen params, `nnx.to_pure_dict(state)`, plain dicts;
            an `nnx.State` with `model`, for its names are not those of Flax.
        selection: which leaves to adapt, over their "/"-joined paths. A string is one regular expression that must
            match the whole path; ``"all-linear"`` is every linear kernel but the output head; a list holds names, each
            a whole path or its end, with or without the leaf's own name (``["q_proj", "mlp/up_proj/kernel"]``), or
            ``"all-linear"`` itself (``["all-linear", "lm_head"]``); a predicate is called with the path and the leaf.
        exclude: leaves to leave out again, said in the same four ways.
        layers: numbers of the layers to adapt, from 0; all of them by default. They count the numbered modules of an
            unrolled model and the entries of the first stack axis of a stacked one.
        layouts: declared layouts, regular expression over the path → one letter an axis (see `Group`). Needed, unless
            `model` shows them, for arrays that no built-in layout covers: kernels stored as (out, in), ``"oi"``;
            experts, ``"lio"``; raw einsum parameters; stack axes other than the leading one, ``"ilo"``.
        model: a function of the parameters alone, such as ``lambda params: apply(params, tokens)``. It is traced, not
            run, and its products tell which arrays are linear weights and what their axes mean, whatever they are
            called; only `layouts` overrule it.

    Built in, by Flax's names: ``kernel`` of Dense, ``embedding`` of Embed, and the ``query``, ``key``, ``value`` and
    ``out`` kernels of the attention modules. A leading stack axis is read off the subtree itself (every leaf begins
    with the same size, and a norm's scale or a Dense's bias has two axes); what is not certain is an error that asks
    for `layouts` or `model`.

    Returns:
        The sites, in the order of the tree.

    Raises:
        ValueError: nothing matches (the message lists near misses), an excluded pattern, a listed name or a declared
            layout matches nothing, a layout is unknown or does not fit, a layer does not exist, `layers` is empty.

    Examples:
        >>> import jax, jaxpeft
        >>> kernel = jax.ShapeDtypeStruct((64, 32), "float32")
        >>> params = {"layers": [{"q_proj": {"kernel": kernel}, "v_proj": {"kernel": kernel}} for _ in range(2)]}
        >>> print(jaxpeft.find(params, r".*/q_proj/kernel"))
        group                   layers  in  out  layout  shape
        layers/*/q_proj/kernel  2       64  32   io      64x32
        2 weights, 4,096 base parameters

        A weight that no name explains, stored as (out, in):

        >>> import jax.numpy as jnp
        >>> print(jaxpeft.find({"w": kernel}, model=lambda params: jnp.ones((1, 32)) @ params["w"].T))
        group  layers  in  out  layout  shape
        w      1       32  64   oi      64x32
        1 weights, 2,048 base parameters
    """
    leaves = flatten(params)
    declared = _declared_layouts(leaves, layouts or {})
    used = None if model is None else _usage(model, params)
    stacked = StackedTrees(leaves)

    def linear(path: str) -> bool:
        if used is None:
            return path in declared or is_linear(path, leaves[path].shape, stacked)
        return path in declared or (used[path].linear and not is_head(path))

    chosen = select(leaves, selection, "selection", linear, shown=used is not None)
    if exclude is not None:
        excluded = set(select(leaves, exclude, "exclude", linear, shown=used is not None))
        if not excluded & set(chosen):
            raise ValueError(f"exclude={exclude!r} leaves out nothing that selection={selection!r} matched")
        chosen = [path for path in chosen if path not in excluded]
        if not chosen:
            raise ValueError(f"exclude={exclude!r} leaves out everything that selection={selection!r} matched")
    wanted = None if layers is None else tuple(sorted(set(layers)))
    if wanted == ():
        raise ValueError("layers=[] leaves no layer; without it all of them are adapted")
    members: dict[tuple[str, tuple[int, ...], str], list[tuple[str, int | None]]] = {}
    for path in chosen:
        leaf = leaves[path]
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"{path} holds {leaf.dtype}; only floating-point weights can be adapted")
        layout = (
            declared.get(path) or (used[path].layout if used else None) or layout_by_name(path, leaf.shape, stacked)
        )
        if layout is None:
            raise ValueError(_uncertain(path, leaf.shape, used))
        name, layer = module_type(path)
        members.setdefault((name, tuple(leaf.shape), layout), []).append((path, layer))
    names = [name for name, _, _ in members]
    groups = []
    for (name, shape, layout), found in members.items():
        unique = name if names.count(name) == 1 else f"{name} [{'x'.join(map(str, shape))}]"
        group = _group_of(unique, found, shape, layout, wanted)
        if group is not None:
            groups.append(group)
    _check_layers(wanted, members)
    return Sites(tuple(groups))


def layouts_of(params: Any, layouts: Mapping[str, str] | None = None) -> dict[str, str]:
    """{path: layout} of every floating-point array whose axes are certain: declared, or known by Flax's names."""
    leaves = flatten(params)
    declared, stacked = _declared_layouts(leaves, layouts or {}), StackedTrees(leaves)
    found = {
        path: declared.get(path) or layout_by_name(path, leaf.shape, stacked)
        for path, leaf in leaves.items()
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    return {path: layout for path, layout in found.items() if layout is not None}


def flatten(params: Any) -> dict[str, Any]:
    """Every array leaf of a tree by its "/"-joined path, in the tree's order."""
    return {path: leaf for path, leaf in paths_and_leaves(params) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")}


def paths_and_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Every leaf of a tree with its "/"-joined path, in the tree's order; a weight in few bits is one leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_quantized)
    return [(jax.tree_util.keystr(keys, simple=True, separator="/"), leaf) for keys, leaf in leaves]


def with_leaves(tree: Any, leaves: Sequence[Any]) -> Any:
    """The tree with other leaves, in the order of `paths_and_leaves`."""
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=is_quantized), leaves)


def _usage(model: Callable[[Any], Any], params: Any) -> dict[str, Usage]:
    """How the model uses each leaf, by its path."""
    named = paths_and_leaves(params)
    shapes = with_leaves(params, [as_floats(leaf) for _, leaf in named])
    return usage(model, shapes, [path for path, _ in named])


def _uncertain(path: str, shape: tuple[int, ...], used: Mapping[str, Usage] | None) -> str:
    """Why the layout of a leaf is not known, and what would tell it."""
    if not shape:
        return f"{path} has shape (): a single number is no site; select the weight beside it"
    example = "l" * (len(shape) - 2) + "io"
    declare = f"layouts={{{module_type(path)[0].replace('*', '.*')!r}: {example!r}}}"
    if used is not None:
        how = ", ".join(dict.fromkeys(used[path].others)) or "nothing"
        return (
            f"{path}, shape {tuple(shape)}, enters {how} in the model, which tells no layout; exclude it, or declare, "
            f"one letter an axis (i in, o out, l stack), for example {declare}"
        )
    return (
        f"the axes of {path}, shape {tuple(shape)}, are not certain from its name; exclude it, let find read them off "
        "the model with model=lambda params: apply(params, inputs), or declare them, one letter an axis (i in, o out, "
        f"l stack), for example {declare}"
    )


def _declared_layouts(leaves: Mapping[str, Any], layouts: Mapping[str, str]) -> dict[str, str]:
    """Path → declared layout, each checked against the array it is declared for."""
    declared: dict[str, str] = {}
    for pattern, layout in layouts.items():
        if set(layout) - set("ilo") or "o" not in layout:
            raise ValueError(
                f"layout {layout!r} of {pattern!r}: expected letters i (in), o (out), l (stack), as in 'lio'"
            )
        regex = compile_pattern(pattern, "layouts")
        matched = [path for path in leaves if regex.fullmatch(path)]
        if not matched:
            raise ValueError(
                f"layouts: {pattern!r} matches none of {len(leaves)} arrays; {nearest_paths(pattern, leaves)}"
            )
        for path in matched:
            shape = leaves[path].shape
            if len(shape) != len(layout):
                raise ValueError(f"layout {layout!r} has {len(layout)} letters, but {path} has shape {tuple(shape)}")
            declared.setdefault(path, layout)
    return declared


def _group_of(
    name: str,
    found: list[tuple[str, int | None]],
    shape: tuple[int, ...],
    layout: str,
    wanted: tuple[int, ...] | None,
) -> Group | None:
    """The group of one module type, cut down to the wanted layers; None if none of them is."""
    found = sorted(found, key=lambda member: -1 if member[1] is None else member[1])
    paths = tuple(path for path, _ in found)
    if wanted is None:
        return Group(name, paths, shape, layout)
    if all(layer is not None for _, layer in found):
        kept = tuple(path for path, layer in found if layer in wanted)
        return Group(name, kept, shape, layout) if kept else None
    if "l" not in layout:
        raise ValueError(
            f"layers={list(wanted)}: {name} has no layer number and no stack axis; exclude it or name its layers"
        )
    entries = tuple(layer for layer in wanted if 0 <= layer < shape[layout.index("l")])
    return Group(name, paths, shape, layout, entries) if entries else None


def _check_layers(
    wanted: tuple[int, ...] | None,
    members: Mapping[tuple[str, tuple[int, ...], str], Sequence[tuple[str, int | None]]],
) -> None:
    """Every wanted layer must be a layer of some group."""
    if wanted is None:
        return
    present: set[int] = set()
    for (_, shape, layout), found in members.items():
        numbers = [layer for _, layer in found if layer is not None]
        present |= set(numbers if len(numbers) == len(found) else range(shape[layout.index("l")]))
    if missing := [layer for layer in wanted if layer not in present]:
        there = sorted(present)
        whole = len(there) > 2 and there == list(range(there[0], there[-1] + 1))
        named = f"{there[0]} to {there[-1]}" if whole else ", ".join(map(str, there))
        raise ValueError(f"layers {missing} do not exist at the selected sites; there are {named}")
