"""Quantized weights from and to the arrays of the package qwix, which is no dependency."""

from typing import Any

import jax.numpy as jnp

from jaxpeft.blocks import Quantized, packed
from jaxpeft.layout import axes

_QWIX: dict[str, tuple[Any, Any]] = {
    "nf4": ("nf4", jnp.uint4),
    "int8": (jnp.int8, jnp.int8),
    "int4": (jnp.int4, jnp.int4),
}
"""{kind: (qtype, dtype of the codes)} of qwix."""


def to_qwix(weight: Quantized) -> Any:
    """A weight as qwix's ``QArray``, tiled along the axis of the blocks; needs the package ``qwix``.

    Args:
        weight: of kind ``nf4``, ``int8``, ``int4`` or ``q8_0``; scales that are quantized come out as floats.

    Raises:
        ValueError: qwix has no such format.
    """
    from qwix import QArray  # pyright: ignore[reportMissingImports]

    if weight.mins is not None:
        raise ValueError(f"qwix has no {weight.kind}, whose blocks have a minimum; it has {', '.join(_QWIX)}")
    kind = "int8" if weight.kind == "q8_0" else weight.kind
    codes = weight.unpacked()
    if kind == "int4":
        codes = codes.astype(jnp.int8) - 8
    return QArray(codes.astype(_QWIX[kind][1]), weight.plain_scales(), qtype=_QWIX[kind][0])


def from_qwix(array: Any, layout: str, dtype: Any = jnp.float32) -> Quantized:
    """A weight of qwix's ``QArray``, its codes and scales kept as they are.

    Args:
        array: of qtype nf4, int8 or int4, tiled along one axis, or not at all: then one block fills an in-axis.
        layout: one letter an axis of the weight, as in `jaxpeft.sites.Group`.
        dtype: of the weight it stands for.

    Raises:
        ValueError: a zero point, another qtype, or tiles over several axes.
    """
    kind = str(array.qtype if isinstance(array.qtype, str) else jnp.dtype(array.qtype))
    if kind not in _QWIX or array.zero_point is not None:
        found = f"{kind}{'' if array.zero_point is None else ' with zero points'}"
        raise ValueError(f"from_qwix: found qtype {found}, expected one of {', '.join(_QWIX)} without zero points")
    shape, scale = array.qvalue.shape, array.scale
    tiled = [axis for axis, (size, count) in enumerate(zip(shape, scale.shape, strict=True)) if 1 < count < size]
    if len(tiled) > 1:
        raise ValueError(f"from_qwix: tiles along the axes {tiled} of {shape}; expected one axis")
    axis = (tiled or [at for at in axes(layout, "i") if scale.shape[at] == 1])[-1] - len(shape)
    codes = array.qvalue.astype(jnp.int8)
    codes = codes if kind == "int8" else (codes + (8 if kind == "int4" else 0)).astype(jnp.uint8)
    count = scale.shape[axis]
    whole = [count if at == axis + len(shape) else size for at, size in enumerate(shape)]
    scales = jnp.broadcast_to(scale.astype(jnp.float32), whole)
    return Quantized(packed(codes, kind, axis, count), scales, None, None, None, kind, axis, jnp.dtype(dtype), layout)
