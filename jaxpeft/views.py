"""Views of an adapted weight: what moves, cuts or casts it and keeps its factors."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import primitives

from jaxpeft.blocks import Quantized, rearranged
from jaxpeft.values import Adapted


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
    weight = transposed(value.weight, value.order)
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
    shape, at = value.shape, params["axis"]
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
        weight=transposed(value.weight, kept),
        updates=jax.tree.map(lambda leaf: jnp.moveaxis(leaf, stack_axis, 0), value.updates),
        layout="".join(value.layout[other] for other in kept),
        order=tuple(kept.index(other) for other in value.order),
    )


def transposed(weight: Array | Quantized, order: Sequence[int]) -> Any:
    """A weight with its axes in another order."""
    return rearranged(weight, lambda array: jnp.transpose(array, order), order)


def without_leading_axis(value: Adapted) -> Adapted:
    """What `stack_axis_first` gave, after the leading axis was taken off every array."""
    return dataclasses.replace(value, layout=value.layout[1:], order=tuple(axis - 1 for axis in value.order[1:]))
