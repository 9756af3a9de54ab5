"""How does a model use each of its arrays? Layouts read off the model's own computation, whatever it calls its weights.

The model is traced to a jaxpr, and every array is followed through views (transposes, reshapes, slices, loops) to what
consumes it. A product tells the layout: the axes it contracts are in-axes, those it batches over, and those that a
loop or an index takes away, stack layers or experts, and the rest are out-axes.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.extend.core as jex
from jax.extend.core import primitives

from jaxpeft.interpret import live_equations, scan_groups


@dataclass
class Usage:
    """What consumes one array.

    Attributes:
        shape: its shape.
        layouts: its layout by every product with activations, in their order; ``io`` where rows are looked up.
        rows: whether rows of it are looked up.
        others: primitives that use it in another way.
    """

    shape: tuple[int, ...]
    layouts: list[str] = field(default_factory=list)
    rows: bool = False
    others: list[str] = field(default_factory=list)

    @property
    def layout(self) -> str | None:
        """Its layout, if a use shows one."""
        return self.layouts[0] if self.layouts else None

    @property
    def linear(self) -> bool:
        """Whether it only enters products: a linear layer's weight."""
        return bool(self.layouts) and not self.rows and not self.others


def usage(model: Callable[[Any], Any], params: Any, paths: Sequence[str]) -> dict[str, Usage]:
    """How `model` uses the leaves of `params`.

    Args:
        model: a function of the parameters alone, with its inputs bound; it is traced, not run.
        params: arrays or `jax.ShapeDtypeStruct`s.
        paths: the name of each leaf, in the tree's order.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> weight = jax.ShapeDtypeStruct((4, 3), "float32")
        >>> usage(lambda p: jnp.ones((2, 3)) @ p["w"].T, {"w": weight}, ["w"])["w"].layouts
        ['oi']
    """
    jaxpr = jax.make_jaxpr(model)(params)
    found = {path: Usage(tuple(leaf.shape)) for path, leaf in zip(paths, jaxpr.in_avals, strict=True)}
    views = [_View(path, tuple((axis,) for axis in range(len(usage.shape)))) for path, usage in found.items()]
    _follow(jaxpr.jaxpr, views, found)
    return found


@dataclass(frozen=True)
class _View:
    """An array seen through views: for every axis of the view the axes of the array that it runs over."""

    path: str
    axes: tuple[tuple[int, ...], ...]
    stack: tuple[int, ...] = ()

    def without(self, axis: int) -> "_View":
        """What one step of a loop over an axis sees."""
        return _View(self.path, self.axes[:axis] + self.axes[axis + 1 :], self.stack + self.axes[axis])


def _follow(jaxpr: jex.Jaxpr, inputs: Sequence[_View | None], found: Mapping[str, Usage]) -> list[_View | None]:
    """Notes the uses of the inputs that are views, and tells which outputs are views."""
    views: dict[Any, _View | None] = dict(zip(jaxpr.invars, inputs, strict=True))

    def view_of(atom: Any) -> _View | None:
        return None if isinstance(atom, jex.Literal) else views.get(atom)

    for equation, _ in live_equations(jaxpr, [True] * len(jaxpr.outvars)):
        operands = [view_of(atom) for atom in equation.invars]
        if not any(operands):
            continue
        results = _into(equation, operands, found)
        if results is None:
            name = equation.primitive.name
            for view in filter(None, operands):
                found[view.path].others.append(name)
            continue
        views |= zip(equation.outvars, results, strict=True)
    return [view_of(atom) for atom in jaxpr.outvars]


def _into(
    equation: jex.JaxprEqn, operands: list[_View | None], found: Mapping[str, Usage]
) -> Sequence[_View | None] | None:
    """The results of an equation as views; None if it is neither a view, nor a product, nor control flow."""
    params, first = equation.params, operands[0]
    shapes = [atom.aval.shape for atom in equation.invars]  # pyright: ignore[reportAttributeAccessIssue]
    match equation.primitive:
        case primitives.dot_general_p:
            return _product(params, operands, found)
        case primitives.gather_p if first and _takes_rows(params, shapes, operands):
            found[first.path].rows = True
            found[first.path].layouts.insert(0, "io")
            return [None]
        case primitives.scan_p:
            return _scan(params, operands, found)
        case primitives.while_p:
            return _while(params, operands, found)
        case primitives.cond_p:
            branches = [_follow(branch.jaxpr, operands[1:], found) for branch in params["branches"]]
            return [views[0] if len(set(views)) == 1 else None for views in zip(*branches, strict=True)]
        case primitives.transpose_p if first:
            axes = tuple(first.axes[axis] for axis in params["permutation"])
        case primitives.squeeze_p if first:
            gone: Any = params["dimensions"]
            axes = tuple(axis for at, axis in enumerate(first.axes) if at not in gone)
        case primitive if primitive.name == "unstack" and first:  # Of jax 0.12 on, without a public name.
            kept = tuple(axis for at, axis in enumerate(first.axes) if at != params["axis"])
            return [dataclasses.replace(first, axes=kept)] * len(equation.outvars)
        case primitives.reshape_p if first and params["dimensions"] is None and math.prod(shapes[0]):
            axes = _reshaped(first.axes, shapes[0], params["new_sizes"])
        case primitives.broadcast_in_dim_p if first:
            places = dict(zip(params["broadcast_dimensions"], first.axes, strict=True))
            axes = tuple(places.get(axis, ()) for axis in range(len(params["shape"])))
        case _ if equation.primitive in _UNCHANGED and first and not any(operands[1:]):
            axes = first.axes
        case _:
            body: Any = params.get("jaxpr", params.get("call_jaxpr"))
            body = body.jaxpr if isinstance(body, jex.ClosedJaxpr) else body
            called = isinstance(body, jex.Jaxpr) and len(body.invars) == len(operands)
            return _follow(body, operands, found) if called else None
    return [dataclasses.replace(first, axes=axes)]


_UNCHANGED = {
    primitives.convert_element_type_p,
    primitives.copy_p,
    primitives.dynamic_slice_p,
    primitives.name_p,
    primitives.sharding_constraint_p,
    primitives.slice_p,
    primitives.stop_gradient_p,
}
"""Primitives whose result has the axes of their first operand, some perhaps shorter."""


def _product(params: dict, operands: Sequence[_View | None], found: Mapping[str, Usage]) -> list[None] | None:
    """Notes the layout that a product with activations shows."""
    if all(operands):
        return [None]  # Two arrays of the model: which is the other's weight is not certain here.
    side = 0 if operands[0] else 1
    view = operands[side]
    assert view is not None
    contracted, batched = (numbers[side] for numbers in params["dimension_numbers"])
    usage = found[view.path]
    letters: list[set[str]] = [set() for _ in usage.shape]
    for at, axes in enumerate(view.axes):
        for axis in axes:
            letters[axis].add("i" if at in contracted else "l" if at in batched else "o")
    for axis in view.stack:
        letters[axis].add("l")
    # What is no longer there was of size one, or an index took one entry of it.
    layout = "".join(
        min(seen, default="o" if size == 1 else "l") for seen, size in zip(letters, usage.shape, strict=True)
    )
    if any(len(seen) > 1 for seen in letters) or not {"i", "o"} <= set(layout):
        return None
    usage.layouts.append(layout)
    return [None]


def _takes_rows(params: dict, shapes: Sequence[tuple[int, ...]], operands: Sequence[_View | None]) -> bool:
    """Whether a gather looks up rows of a whole matrix."""
    numbers, view = params["dimension_numbers"], operands[0]
    whole = view is not None and view.axes == ((0,), (1,)) and not view.stack
    return (
        whole
        and numbers.collapsed_slice_dims == numbers.start_index_map == (0,)
        and params["slice_sizes"] == (1, shapes[0][1])
    )


def _reshaped(
    axes: Sequence[tuple[int, ...]], shape: Sequence[int], new_shape: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """The axes of a reshaped view: a merged axis runs over all it was made of, and so do the parts of a split one."""
    old = [(size, axis) for size, axis in zip(shape, axes, strict=True) if size != 1]
    sizes = [size for size in new_shape if size != 1]
    origins: list[tuple[int, ...]] = []
    begin = 0
    while begin < len(old):
        end, new_end = begin + 1, len(origins) + 1
        while (have := math.prod(size for size, _ in old[begin:end])) != (
            want := math.prod(sizes[len(origins) : new_end])
        ):
            end, new_end = (end + 1, new_end) if have < want else (end, new_end + 1)
        merged = tuple(dict.fromkeys(number for _, axis in old[begin:end] for number in axis))
        origins += [merged] * (new_end - len(origins))
        begin = end
    remaining = iter(origins)
    return tuple(() if size == 1 else next(remaining) for size in new_shape)


def _scan(params: dict, operands: list[_View | None], found: Mapping[str, Usage]) -> list[_View | None]:
    consts, carry, stacked = scan_groups(params, operands)
    _note(carry, "scan carry", found)
    slices = [view and view.without(0) for view in stacked]
    body = params["jaxpr"].jaxpr
    _follow(body, [*consts, *[None] * len(carry), *slices], found)
    # A stacked weight that the body hands back slice by slice is that weight again.
    passed_on = dict(zip(body.invars[len(consts) + len(carry) :], stacked, strict=True))
    return [None if isinstance(atom, jex.Literal) else passed_on.get(atom) for atom in body.outvars]


def _while(params: dict, operands: list[_View | None], found: Mapping[str, Usage]) -> list[None]:
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    carry = operands[second:]
    _note(carry, "while carry", found)
    _follow(params["cond_jaxpr"].jaxpr, [*operands[:first], *[None] * len(carry)], found)
    _follow(params["body_jaxpr"].jaxpr, [*operands[first:second], *[None] * len(carry)], found)
    return [None] * len(carry)


def _note(views: Sequence[_View | None], how: str, found: Mapping[str, Usage]) -> None:
    for view in filter(None, views):
        found[view.path].others.append(how)
