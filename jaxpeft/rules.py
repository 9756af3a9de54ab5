"""How single operations compute with an adapted weight: products with its factors, and `jaxpeft.views`."""

import contextlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import Array
from jax.extend.core import primitives

from jaxpeft import views
from jaxpeft.blocks import Quantized, dequantized
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

    weight = views.transposed(value.weight, value.order)
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


RULES: dict[jex.Primitive, Callable[..., Any]] = {
    primitives.add_p: add,
    primitives.dot_general_p: dot_general,
    primitives.gather_p: gather,
    primitives.convert_element_type_p: views.convert_element_type,
    primitives.transpose_p: views.transpose,
    primitives.reshape_p: views.reshape,
    primitives.squeeze_p: views.squeeze,
    primitives.broadcast_in_dim_p: views.broadcast_in_dim,
    primitives.slice_p: views.slice_,
    primitives.dynamic_slice_p: views.dynamic_slice,
    primitives.stop_gradient_p: views.stop_gradient,
    primitives.device_put_p: views.device_put,
    jax.lax.optimization_barrier_p: views.optimization_barrier,
    primitives.sharding_constraint_p: views.on_weight(primitives.sharding_constraint_p.bind),
    primitives.copy_p: views.on_weight(primitives.copy_p.bind),
    primitives.name_p: views.on_weight(primitives.name_p.bind),
}

RULES_BY_NAME: dict[str, Callable[..., Any]] = {
    "pvary": views.pvary,
    "reshard": views.reshard,
    "unstack": views.unstack,
}
"""Rules of primitives that jax gives no public name."""


def rule_of(primitive: jex.Primitive) -> Callable[..., Any] | None:
    """How a primitive computes with adapted weights; None where they have to be formed."""
    return RULES.get(primitive) or RULES_BY_NAME.get(primitive.name)
