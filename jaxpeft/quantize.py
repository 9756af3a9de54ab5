"""4-bit and 8-bit base weights: a base tree some of whose weights are codes and scales, used in place of the floats."""

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from jaxpeft.blocks import Quantized, dequantized, encode, is_quantized
from jaxpeft.formats import KINDS
from jaxpeft.layout import axes
from jaxpeft.qarray import from_qwix, to_qwix
from jaxpeft.selection import ALL_LINEAR, Selection
from jaxpeft.sites import find, flatten

__all__ = ["KINDS", "Quantized", "dequantize", "from_qwix", "nbytes", "quantize", "shardings", "to_qwix"]


def quantize(
    base: Any,
    kind: str = "nf4",
    *,
    block: int | None = None,
    double: bool | None = None,
    selection: Selection = ALL_LINEAR,
    exclude: Selection | None = None,
    layouts: Mapping[str, str] | None = None,
    model: Callable[[Any], Any] | None = None,
) -> Any:
    """The base with the selected weights in few bits; `jaxpeft.adapt` takes it in place of the floats.

    w ≈ scale · code for every block of neighbouring inputs of an output. A kernel's blocks lie along its last in-axis;
    those of an ``embedding`` along its out-axis, so that a row has its own. Weights are converted one after the other.

    Args:
        base: the base parameters, of any float type; it stays as it is. `jax.ShapeDtypeStruct` leaves give shapes.
        kind: ``nf4`` (QLoRA), ``int8`` and ``int4`` (symmetric), or GGUF's ``q4_1`` and ``q8_0``.
        block: weights that share a scale. Default: 64; GGUF's formats have 32.
        double: whether the scales are quantized too, to 8 bits with their mean subtracted. Default: for ``nf4`` alone.
        selection: which weights, as in `jaxpeft.find`; embedding and head stay float unless they are named, as in
            ``["all-linear", "embed"]``.
        exclude: as in `jaxpeft.find`.
        layouts: as in `jaxpeft.find`.
        model: as in `jaxpeft.find`.

    Returns:
        A new tree with `Quantized` in place of the selected weights, laid out over a mesh as these were; everything
        else is shared.

    Raises:
        ValueError: from `jaxpeft.find`; an unknown kind, a block that does not divide the axis or that the format does
            not have, a vector, or a weight that is quantized already.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> base = {"up": {"kernel": jnp.linspace(-1, 1, 64 * 8).reshape(64, 8)}}
        >>> small = jaxpeft.quantize.quantize(base, "nf4")
        >>> weight = small["up"]["kernel"]
        >>> weight.shape, weight.codes.shape, weight.scales.shape
        ((64, 8), (32, 8), (1, 8))
        >>> bool(jnp.abs(weight.dequantize() - base["up"]["kernel"]).max() < 0.16)
        True

    Source: arXiv 2305.14314 §3 (NormalFloat, double quantization).
    """
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0)
        raise ValueError(f"quantize: kind {kind!r} is not known; one of {', '.join(KINDS)}; nearest: {near[0]!r}")
    format, leaves = KINDS[kind], flatten(base)
    sites = find(base, selection, exclude=exclude, layouts=layouts, model=model)
    chosen = {path: group for group in sites for path in group.paths}
    plans = {}
    for path, group in chosen.items():
        if is_quantized(leaves[path]):
            raise ValueError(f"{path} is {leaves[path].kind} already; exclude it, or dequantize the base first")
        along = "o" if path.rpartition("/")[2] == "embedding" else "i"
        if not axes(group.layout, along):
            raise ValueError(f"{path} is a vector, shape {group.shape}; only matrices are quantized: exclude it")
        axis = axes(group.layout, along)[-1]
        size = _check_block(path, kind, format.block if block is None else block, group.shape[axis])
        settings = (kind, axis, size, format.double if double is None else double, group.layout)
        if settings[3] and format.fixed:
            raise ValueError(f"double=True: {kind} has scales of 16 bits; quantized scales have nf4, int8 and int4")
        plans[path] = settings
    # Paths, and not the tree, say what is done: leaves that are no arrays stay in their places.
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: _quantize_one(leaf, plans[path]) if (path := _path(keys)) in plans else leaf,
        base,
        is_leaf=is_quantized,
    )


def dequantize(base: Any) -> Any:
    """The base with every weight as the floats it stands for, in the dtype that it was quantized from.

    Examples:
        >>> import jax.numpy as jnp, jaxpeft
        >>> base = jaxpeft.quantize.quantize({"up": {"kernel": jnp.eye(64)}}, "q8_0")
        >>> float(jnp.abs(jaxpeft.quantize.dequantize(base)["up"]["kernel"] - jnp.eye(64)).max()) < 1e-3
        True
    """
    once = jax.jit(dequantized)  # One pass over each weight.
    return jax.tree.map(lambda leaf: once(leaf) if is_quantized(leaf) else leaf, base, is_leaf=is_quantized)


def nbytes(base: Any) -> int:
    """Bytes that a base tree stores, of arrays or of shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(base))


def shardings(weight: Quantized, sharding: jax.sharding.Sharding) -> Quantized:
    """The shardings of the arrays of a weight that is sharded as given.

    The axis of the blocks is split between blocks, so that every device computes its own shard; where the mesh does not
    divide the number of blocks, that axis is whole.
    """

    def of(array: Any) -> jax.sharding.Sharding:
        if not isinstance(sharding, NamedSharding):
            return sharding
        shape = list(array.shape)
        shape[weight.axis] = min(shape[weight.axis], weight.scales.shape[weight.axis])
        kept = []
        for size, names in zip(shape, (*sharding.spec, *[None] * len(shape)), strict=False):
            each = names if isinstance(names, tuple) else () if names is None else (names,)
            parts = 1
            for name in each:
                parts *= sharding.mesh.shape[name]
            kept.append(names if size % parts == 0 else None)
        return NamedSharding(sharding.mesh, PartitionSpec(*kept), memory_kind=sharding.memory_kind)

    return jax.tree.map(of, weight)


def _quantize_one(weight: Any, settings: tuple) -> Quantized:
    kind, axis, block, double, layout = settings
    convert = partial(encode, kind=kind, axis=axis, block=block, double=double, layout=layout)
    abstract = jax.eval_shape(convert, weight)
    sharding = None if isinstance(weight, Tracer) else getattr(weight, "sharding", None)
    if sharding is None:
        return abstract if isinstance(weight, jax.ShapeDtypeStruct) else jax.jit(convert)(weight)
    placed = shardings(abstract, sharding)
    if isinstance(weight, jax.ShapeDtypeStruct):
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, placed)
    return jax.jit(convert, out_shardings=placed)(weight)


def _check_block(path: str, kind: str, block: int, size: int) -> int:
    """The block, if the format has it and it divides the axis."""
    if KINDS[kind].fixed and block != KINDS[kind].block:
        raise ValueError(f"block={block}: {kind} has blocks of {KINDS[kind].block}")
    even = KINDS[kind].bits == 4  # A block's halves share bytes.
    if block < 1 or size % block or (even and block % 2):
        valid = [n for n in range(1, size + 1) if size % n == 0 and not (even and n % 2)]
        if KINDS[kind].fixed or not valid:
            advice = "exclude it, or take another kind"
        else:
            advice = f"nearest: block={min(valid, key=lambda n: abs(n - block))}, or exclude it"
        wanted = f"{'an even' if even else 'a'} divisor of the axis that is quantized, of size {size}"
        raise ValueError(f"{path}: block={block}, expected {wanted}; {advice}")
    return block


def _path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")
