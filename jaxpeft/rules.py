"""How single operations compute with an adapted weight: products with its factors, and views that keep them."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import Array
from jax.extend.core import primitives

from jaxpeft.blocks import Quantized, dequantized, rearranged
from jaxpeft.layout import to_matrix
from jaxpeft.updates import Base, Update
from jaxpeft.values import Adapted, by_layer, in_auto, record


def dot_general(params: dict, lhs: Any, rhs: Any) -> Any:
    """x·W' over all of W's in-axes, or over all of its out-axes, from either side; stack axes are batched or free."""
    if isinstance(lhs, Adapted) and isinstance(rhs, Adapted):
        return NotImplemented
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = params["dimension_numbers"]
    on_left = isinstance(lhs, Adapted)
    value, x = (lhs, rhs) if on_left else (rhs, lhs)
    contract, batch = (lhs_contract, lhs_batch) if on_left else (rhs_contract, rhs_batch)
    x_contract, x_batch = (rhs_contract, rhs_batch) if on_left else (lhs_contract, lhs_batch)
    frozen = _frozen(params, value, on_left)
    if not value.updates:  # In few bits and not adapted: any product will do.
        record(value, "dot_general", fused=True)
        return frozen(value.weight, x)
    contracted = [value.order[axis] for axis in contract]
    batched = [value.order[axis] for axis in batch]
    stack = value.axes("l")
    backwards = sorted(contracted) == value.axes("o")
    if not (backwards or sorted(contracted) == value.axes("i")) or not set(batched) <= set(stack):
        return NotImplemented
    # One product with W + ΔW is cheaper than two, but only float32 holds their sum without drowning ΔW.
    quantized = isinstance(value.weight, Quantized)
    if value.formed and value.weight.dtype == jnp.float32 and not quantized:
        return NotImplemented
    if backwards and any(update.on_output for update in value.updates):
        raise ValueError(f"{value.site}: an adapter behind a layer's output, but here its transpose is multiplied")
    record(value, "dot_general, transposed" if backwards else "dot_general", fused=True)

    outs = value.axes("i" if backwards else "o")
    additive = all(update.additive for update in value.updates)
    x_stack = [x_batch[batched.index(axis)] for axis in stack if axis in batched]
    x_features = [x_contract[contracted.index(axis)] for axis in sorted(contracted)]
    x_free = [axis for axis in range(x.ndim) if axis not in (*x_batch, *x_contract)]
    result = None if additive else jax.eval_shape(frozen, value.weight, x)
    dtype = x.dtype if result is None else result.dtype  # Of x·W', or of x·ΔW as a method gives it.

    def features(letter: str) -> int:
        return math.prod(value.dims(letter))

    def product(updates: tuple[Update, ...], matrix: Array | None, rows: Array) -> Array:
        def forward(rows: Array) -> Array:
            return _product(updates, base, rows)

        if not backwards:
            base = None if matrix is None else Base(matrix, partial(_dot, params, matrix))
            return forward(rows)
        # The sums are of the type that the rows of the transpose have, so those have the widest: nothing is rounded
        # before it is summed. They are made of `rows`, to vary over the same axes of a mesh.
        wide = jnp.promote_types(rows.dtype, dtype)
        kept = {**params, "preferred_element_type": wide}
        base = None if matrix is None else Base(matrix, partial(_dot, kept, matrix))
        like = jax.eval_shape(partial(jnp.zeros_like, shape=(*rows.shape[:-1], features("i")), dtype=wide), rows)
        out = jax.eval_shape(forward, like)
        return jax.linear_transpose(forward, like)(rows.astype(out.dtype))[0].astype(dtype)

    def over(stack: Sequence[int], updates: tuple[Update, ...], matrix: Array | None, rows: Array) -> Array:
        if not stack:
            return product(updates, matrix, rows)
        leaves, axes, join = by_layer(updates, value.weight.shape[stack[0]])
        in_axes = (axes, None if additive else 0, 0 if stack[0] in batched else None)
        inner = partial(over, stack[1:])
        return jax.vmap(lambda leaves, *others: inner(join(leaves), *others), in_axes=in_axes)(leaves, matrix, rows)

    def computed(updates: tuple[Update, ...], weight: Array | Quantized | None, x: Array) -> Array:
        # x as (*batched stack, *free, features) in the order of the weight's own axes.
        rows = jnp.transpose(x, [*x_stack, *x_free, *x_features])
        rows = rows.reshape(*rows.shape[: len(x_stack) + len(x_free)], features("o" if backwards else "i"))
        with _precision(params["precision"]):
            y = over(stack, updates, None if weight is None else to_matrix(weight, value.layout), rows)
        y = y.reshape(*y.shape[:-1], *(value.weight.shape[axis] for axis in outs))
        # From (*stack, *free, *outs) to dot_general's own order: batch, free axes of lhs, free axes of rhs.
        free_of_value = [("w", axis) for axis in value.order if axis not in contracted and axis not in batched]
        free_of_x = [("x", axis) for axis in x_free]
        have = [*(("w", axis) for axis in stack), *free_of_x, *(("w", axis) for axis in outs)]
        want = [("w", axis) for axis in batched]
        want += free_of_value + free_of_x if on_left else free_of_x + free_of_value
        return jnp.transpose(y, [have.index(axis) for axis in want])

    if result is not None:
        again = jax.checkpoint(computed) if quantized else computed  # As in `_frozen`.
        return in_auto(again, result)(value.updates, value.weight, x)
    y = frozen(value.weight, x)
    return y + in_auto(lambda updates, x: computed(updates, None, x).astype(y.dtype), y)(value.updates, x)


def _frozen(params: dict, value: Adapted, on_left: bool) -> Callable[[Array | Quantized, Array], Array]:
    """The model's own product, of W and x."""

    def product(weight: Array | Quantized, x: Array) -> Array:
        floats = in_auto(dequantized, weight)(weight) if isinstance(weight, Quantized) else weight
        floats = jnp.transpose(floats, value.order)
        return primitives.dot_general_p.bind(*((floats, x) if on_left else (x, floats)), **params)

    # The backward pass of x·W needs W. From few bits it is made a second time, or the floats of all layers would wait
    # for it; the product itself is not repeated, for nothing there needs it.
    return jax.checkpoint(product) if isinstance(value.weight, Quantized) else product


def _dot(params: dict, matrix: Array, rows: Array) -> Array:
    """The model's own product, with one weight as (in, out) matrix."""
    kept = {name: params[name] for name in ("precision", "preferred_element_type")}
    return jax.lax.dot_general(rows, matrix, (((rows.ndim - 1,), (0,)), ((), ())), **kept)


def _product(updates: tuple[Update, ...], base: Base | None, rows: Array) -> Array:
    """x·W' of one weight; only x·ΔW where every update is additive and no base is given."""
    if base is None:
        return sum(update.delta_matmul(rows) for update in updates)  # pyright: ignore[reportReturnType]
    total, *others = [update.matmul(rows, base) for update in updates if not update.on_output] or [base.dot(rows)]
    for other in others:
        total = total + (other - base.dot(rows))
    return _transformed(updates, total)


def _transformed(updates: tuple[Update, ...], y: Array) -> Array:
    """A layer's output after the updates that act on it."""
    for update in updates:
        y = update.transform(y) if update.on_output else y
    return y


def add(params: dict, lhs: Any, rhs: Any) -> Any:
    """Adds a bias that updates of the layer's output are attached to, and lets them act."""
    value, x = (lhs, rhs) if isinstance(lhs, Adapted) else (rhs, lhs)
    on_output = [update.on_output for update in value.updates]
    if isinstance(x, Adapted) or not all(on_output) or value.letters != "l" * (x.ndim - 1) + "o":
        return NotImplemented
    if isinstance(value.weight, Quantized) or value.shape != (*(1,) * (x.ndim - 1), x.shape[-1]):
        return NotImplemented
    record(value, "add", fused=True)
    y = primitives.add_p.bind(x, jnp.transpose(value.weight, value.order), **params)
    one = jax.tree.map(lambda leaf: jnp.squeeze(leaf, tuple(range(x.ndim - 1))), value.updates)
    return in_auto(_transformed, y)(one, y)


def _precision(precision: Any) -> contextlib.AbstractContextManager:
    """The model's own matmul precision, for the products with the factors."""
    first = precision[0] if isinstance(precision, tuple) else precision
    if first is None:
        return contextlib.nullcontext()
    name = first.name.lower() if isinstance(first, jax.lax.Precision) else first.name
    return jax.default_matmul_precision(name)


def gather(params: dict, value: Any, indices: Any) -> Any:
    """Rows of an embedding: W[ids] + rows of ΔW."""
    numbers = params["dimension_numbers"]
    takes_rows = (
        isinstance(value, Adapted)
        and value.letters == "io"
        and numbers.collapsed_slice_dims == numbers.start_index_map == (0,)
        and numbers.offset_dims == (indices.ndim - 1,)
        and not numbers.operand_batching_dims
        and params["slice_sizes"] == (1, value.shape[1])
    )
    if not takes_rows:
        return NotImplemented

    def take(matrix: Array, **changed: Any) -> Array:
        return primitives.gather_p.bind(matrix, indices, **{**params, "slice_sizes": (1, matrix.shape[1]), **changed})

    def take_or_zero(matrix: Array) -> Array:
        return take(matrix, fill_value=0)

    def take_part(array: Array) -> Array:  # Scales are filled as the weight is, and their codes with what leaves that.
        return take(array) if jnp.issubdtype(array.dtype, jnp.floating) else take_or_zero(array)

    weight = _transposed(value.weight, value.order)
    if isinstance(weight, Quantized):
        fill = params["fill_value"]
        if weight.axis != -1 or not (fill is None or fill == 0 or fill != fill):
            return NotImplemented  # A row has parts of many blocks, or scales cannot say what it is filled with.
        rows = jax.tree.map(take_part, weight).dequantize()
    else:
        rows = take(weight)
    for update in value.updates:  # Past the last row there is what the model fills in, and nothing is added to it.
        delta = update.delta_rows(take_or_zero) if update.additive else None
        if delta is None:
            return NotImplemented
        rows = rows + delta.astype(rows.dtype)
    record(value, "gather", fused=True)
    return rows


def convert_element_type(params: dict, value: Adapted) -> Any:
    """The weight in another float type. The factors keep theirs: they follow the dtype of what they multiply."""
    if not jnp.issubdtype(params["new_dtype"], jnp.floating):
        return NotImplemented
    if isinstance(value.weight, Quantized):
        return dataclasses.replace(value, weight=value.weight.astype(params["new_dtype"]))
    weight = primitives.convert_element_type_p.bind(value.weight, **params)
    return dataclasses.replace(value, weight=weight)


def transpose(params: dict, value: Adapted) -> Adapted:
    """Another order of the axes; nothing moves."""
    return dataclasses.replace(value, order=tuple(value.order[axis] for axis in params["permutation"]))


def reshape(params: dict, value: Adapted) -> Any:
    """Splits or merges neighbouring in-axes, or neighbouring out-axes; or adds axes of size one."""
    places = [axis for axis, size in enumerate(params["new_sizes"]) if size != 1]
    if [params["new_sizes"][axis] for axis in places] == list(value.shape):
        return broadcast_in_dim({"broadcast_dimensions": places, "shape": params["new_sizes"]}, value)
    settled = _settle(value)
    if settled is NotImplemented or params["dimensions"] is not None or isinstance(value.weight, Quantized):
        return NotImplemented
    layout = _reshaped_layout(settled.shape, settled.layout, params["new_sizes"])
    if layout is None:
        return NotImplemented
    weight = primitives.reshape_p.bind(settled.weight, **params)
    return dataclasses.replace(settled, weight=weight, layout=layout, order=tuple(range(len(layout))))


def _settle(value: Adapted) -> Any:
    """The same value with its weight transposed into its order, if axes of one letter keep theirs."""
    if any([axis for axis in value.order if value.layout[axis] == letter] != value.axes(letter) for letter in "ilo"):
        return NotImplemented
    weight = _transposed(value.weight, value.order)
    return dataclasses.replace(value, weight=weight, layout=value.letters, order=tuple(range(weight.ndim)))


def _reshaped_layout(shape: Sequence[int], layout: str, new_shape: Sequence[int]) -> str | None:
    """Letters of a reshaped array, or None if an axis would mix letters or split a stack."""
    if 1 in shape or 1 in new_shape:  # Which neighbour a unit axis belongs to is not certain.
        return None
    letters, begin = "", 0
    while begin < len(shape):
        end, new_end = begin + 1, len(letters) + 1
        while (old := math.prod(shape[begin:end])) != (new := math.prod(new_shape[len(letters) : new_end])):
            end, new_end = (end + 1, new_end) if old < new else (end, new_end + 1)
        block, count = layout[begin:end], new_end - len(letters)
        if len(set(block)) > 1 or ("l" in block and (len(block), count) != (1, 1)):
            return None
        letters, begin = letters + block[0] * count, end
    return letters


def squeeze(params: dict, value: Adapted) -> Adapted:
    """Drops axes of size one."""
    dropped = [value.order[axis] for axis in params["dimensions"]]
    stack = [value.axes("l").index(axis) for axis in dropped if value.layout[axis] == "l"]
    kept = [axis for axis in range(len(value.layout)) if axis not in dropped]
    return dataclasses.replace(
        value,
        weight=rearranged(value.weight, lambda array: jax.lax.squeeze(array, dropped), kept),
        updates=jax.tree.map(lambda leaf: jax.lax.squeeze(leaf, stack), value.updates),
        layout="".join(value.layout[axis] for axis in kept),
        order=tuple(kept.index(axis) for axis in value.order if axis in kept),
    )


def broadcast_in_dim(params: dict, value: Adapted, *dynamic: Any) -> Any:
    """Adds axes of size one, as stacks of a single layer."""
    places, shape = params["broadcast_dimensions"], params["shape"]
    new = [axis for axis in range(len(shape)) if axis not in places]
    if dynamic or [shape[axis] for axis in places] != list(value.shape) or any(shape[axis] != 1 for axis in new):
        return NotImplemented
    # The new axes are stored last; of the stack axes they are then the last as well.
    stored = dict(zip(new, range(len(value.layout), len(shape)), strict=True))
    stack = len(value.axes("l"))
    return dataclasses.replace(
        value,
        weight=rearranged(
            value.weight,
            lambda array: jnp.expand_dims(array, tuple(stored.values())),
            [*range(len(value.layout)), *[None] * len(new)],
        ),
        updates=jax.tree.map(lambda leaf: jnp.expand_dims(leaf, tuple(range(stack, stack + len(new)))), value.updates),
        layout=value.layout + "l" * len(new),
        order=tuple(stored[axis] if axis in stored else value.order[places.index(axis)] for axis in range(len(shape))),
    )


def slice_(params: dict, value: Adapted) -> Any:
    """A static slice of the layers."""
    starts, limits = params["start_indices"], params["limit_indices"]
    strides = params["strides"] or (1,) * len(starts)

    def cut(array: Array, axis: int, view_axis: int) -> Array:
        return jax.lax.slice_in_dim(array, starts[view_axis], limits[view_axis], strides[view_axis], axis)

    sizes = [len(range(*bounds)) for bounds in zip(starts, limits, strides, strict=True)]
    return _cut_stack(value, sizes, cut)


def unstack(params: dict, value: Adapted) -> Any:
    """All entries of one axis, as iteration over an array reads them from jax 0.12 on."""
    shape, at = [value.weight.shape[axis] for axis in value.order], params["axis"]
    entries = []
    for number in range(shape[at]):
        bounds = {"start_indices": [0] * len(shape), "limit_indices": list(shape), "strides": None}
        bounds["start_indices"][at], bounds["limit_indices"][at] = number, number + 1
        one = slice_(bounds, value)
        if one is NotImplemented:
            return NotImplemented
        entries.append(squeeze({"dimensions": (at,)}, one))
    return entries


def dynamic_slice(params: dict, value: Any, *starts: Any) -> Any:
    """A slice of the layers at traced positions."""
    if not isinstance(value, Adapted):
        return NotImplemented
    sizes = params["slice_sizes"]

    def cut(array: Array, axis: int, view_axis: int) -> Array:
        return jax.lax.dynamic_slice_in_dim(array, starts[view_axis], sizes[view_axis], axis)

    return _cut_stack(value, sizes, cut)


def _cut_stack(value: Adapted, sizes: Sequence[int], cut: Callable[[Array, int, int], Array]) -> Any:
    """Cuts the weight and its updates along the stack axes that become smaller; other axes must stay whole."""
    weight, updates = value.weight, value.updates
    for view_axis, (size, whole) in enumerate(zip(sizes, value.shape, strict=True)):
        if size == whole:
            continue
        axis = value.order[view_axis]
        if value.layout[axis] != "l":
            return NotImplemented
        weight = rearranged(weight, lambda array, at=axis, view=view_axis: cut(array, at, view), range(weight.ndim))
        stack_axis = value.axes("l").index(axis)
        updates = jax.tree.map(
            lambda leaf, at=stack_axis, view=view_axis: leaf if leaf.shape[at] == 1 else cut(leaf, at, view), updates
        )
    return dataclasses.replace(value, weight=weight, updates=updates)


def stop_gradient(params: dict, value: Adapted) -> Adapted:
    """No gradient flows to the factors."""
    return jax.tree.map(lambda leaf: primitives.stop_gradient_p.bind(leaf, **params), value)


def pvary(params: dict, value: Adapted) -> Adapted:
    """In `jax.shard_map`: each device has its own value. Then what is summed over them are gradients of factors."""
    return jax.tree.map(lambda leaf: jax.lax.pcast(leaf, tuple(params["axes"]), to="varying"), value)


def optimization_barrier(params: dict, *operands: Any) -> list[Any]:
    """A barrier for the weights and what stands beside them; the factors are no values of the model."""
    arrays, structure = jax.tree.flatten([x.weight if isinstance(x, Adapted) else x for x in operands])
    behind = structure.unflatten(jax.lax.optimization_barrier_p.bind(*arrays, **params))
    pairs = zip(operands, behind, strict=True)
    return [dataclasses.replace(x, weight=y) if isinstance(x, Adapted) else y for x, y in pairs]


def device_put(params: dict, *operands: Any) -> Any:
    """Between the memories of host and device, with the factors: products need all in one."""
    places = params["devices"]
    if not all(place is None or isinstance(place, jax.memory.Space) for place in places):
        return NotImplemented  # Where the factors should go is not said.
    return [jax.device_put(x, place) for x, place in zip(operands, places, strict=True)]


def reshard(params: dict, value: Adapted) -> Any:
    """The weight lies otherwise; its factors stay, for how their products lie is the compiler's to choose."""
    if isinstance(value.weight, Quantized):
        return NotImplemented  # What splits the floats need not split their blocks.
    return on_weight(lambda floats, **_: jax.sharding.reshard(floats, params["dst_sharding"]))(params, value)


def on_weight(operation: Callable[..., Array]) -> Callable:
    """Rule of an operation that leaves the values as they are: it is done to the weight alone."""

    def rule(params: dict, value: Adapted) -> Adapted:
        if isinstance(value.weight, Quantized):  # What is asked of its floats is not asked of its codes.
            return value
        done = operation(jnp.transpose(value.weight, value.order), **params)
        back = [value.order.index(axis) for axis in range(done.ndim)]
        return dataclasses.replace(value, weight=jnp.transpose(done, back))

    return rule


def stack_axis_first(value: Adapted) -> Any:
    """The same value stored with its first axis, which must stack layers, as the leading axis of all arrays."""
    axis = value.order[0]
    if value.layout[axis] != "l":
        return NotImplemented
    kept = [axis, *(other for other in range(len(value.layout)) if other != axis)]
    stack_axis = value.axes("l").index(axis)
    return dataclasses.replace(
        value,
        weight=_transposed(value.weight, kept),
        updates=jax.tree.map(lambda leaf: jnp.moveaxis(leaf, stack_axis, 0), value.updates),
        layout="".join(value.layout[other] for other in kept),
        order=tuple(kept.index(other) for other in value.order),
    )


def _transposed(weight: Array | Quantized, order: Sequence[int]) -> Any:
    return rearranged(weight, lambda array: jnp.transpose(array, order), order)


def without_leading_axis(value: Adapted) -> Adapted:
    """What `stack_axis_first` gave, after the leading axis was taken off every array."""
    return dataclasses.replace(value, layout=value.layout[1:], order=tuple(axis - 1 for axis in value.order[1:]))


RULES: dict[jex.Primitive, Callable[..., Any]] = {
    primitives.add_p: add,
    primitives.dot_general_p: dot_general,
    primitives.gather_p: gather,
    primitives.convert_element_type_p: convert_element_type,
    primitives.transpose_p: transpose,
    primitives.reshape_p: reshape,
    primitives.squeeze_p: squeeze,
    primitives.broadcast_in_dim_p: broadcast_in_dim,
    primitives.slice_p: slice_,
    primitives.dynamic_slice_p: dynamic_slice,
    primitives.stop_gradient_p: stop_gradient,
    primitives.device_put_p: device_put,
    jax.lax.optimization_barrier_p: optimization_barrier,
    primitives.sharding_constraint_p: on_weight(primitives.sharding_constraint_p.bind),
    primitives.copy_p: on_weight(primitives.copy_p.bind),
    primitives.name_p: on_weight(primitives.name_p.bind),
}

RULES_BY_NAME: dict[str, Callable[..., Any]] = {"pvary": pvary, "reshard": reshard, "unstack": unstack}
"""Rules of primitives that jax gives no public name."""


def rule_of(primitive: jex.Primitive) -> Callable[..., Any] | None:
    """How a primitive computes with adapted weights; None where they have to be formed."""
    return RULES.get(primitive) or RULES_BY_NAME.get(primitive.name)
