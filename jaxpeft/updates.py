"""What a method yields: the update of a weight, and the ways to apply it without forming it.

Every array of an update leads with the group's layers; the engine maps the functions below over them, so each speaks of
one (in, out) weight. A new structure overrides `delta` and `delta_matmul`; one that multiplies or rescales the frozen
weight overrides `materialize` and `matmul`, which receive it. Where all arrays of an update are zero it must change
nothing: that is how the layers that are not adapted are filled in a stacked array.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array


@dataclass(frozen=True)
class Base:
    """The frozen weight as an update sees it.

    Attributes:
        weight: the (in, out) matrix.
        dot: the model's own product with it, at the model's precision: (..., in) -> (..., out).
    """

    weight: Array
    dot: Callable[[Array], Array]


class Update:
    """The update of one weight W0; the engine applies, merges, saves and serves it.

    Attributes:
        additive: W' = W0 + ΔW with a ΔW that does not depend on W0.
        formed: applying it needs ΔW as an array, so forming W' loses nothing.
    """

    additive: ClassVar[bool] = True
    formed: ClassVar[bool] = False

    def delta(self) -> Array:
        """ΔW, (in, out), float32."""
        raise NotImplementedError(f"{type(self).__name__}.delta")

    def delta_matmul(self, x: Array) -> Array:
        """x·ΔW for x (..., in), in the dtype of x."""
        return x @ self.delta().astype(x.dtype)

    def delta_rows(self, take: Callable[[Array], Array]) -> Array | None:
        """Rows of ΔW, for an embedding; `take` picks the same rows of any (in, k) matrix. None if ΔW must be formed."""
        del take
        return None

    def materialize(self, weight: Array) -> Array:
        """W' as an (in, out) matrix, from W0 in float32."""
        return weight + self.delta()

    def matmul(self, x: Array, base: Base) -> Array:
        """x·W' for x (..., in)."""
        y = base.dot(x)
        return y + self.delta_matmul(x).astype(y.dtype)

    def factors(self) -> "LowRank | None":
        """This update as a product of two factors over the same layers, if it is exactly one."""
        return None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank(Update):
    """ΔW = scale · aᵀ b, computed as ((x aᵀ) · scale) b.

    Attributes:
        a: (..., r, in)
        b: (..., r, out)
        scale: (...)

    Example:
        >>> import jax.numpy as jnp
        >>> update = LowRank(a=jnp.ones((2, 3)), b=jnp.ones((2, 5)), scale=jnp.float32(0.5))
        >>> update.delta().shape, float(update.delta()[0, 0])
        ((3, 5), 1.0)
    """

    a: Array
    b: Array
    scale: Array

    def delta(self) -> Array:  # noqa: D102
        return jnp.einsum("ri,ro->io", self.a * self.scale, self.b, precision="highest")

    def delta_matmul(self, x: Array) -> Array:  # noqa: D102
        hidden = jnp.einsum("...i,ri->...r", x, self.a.astype(x.dtype))
        return (hidden * self.scale.astype(x.dtype)) @ self.b.astype(x.dtype)

    def delta_rows(self, take: Callable[[Array], Array]) -> Array:  # noqa: D102
        return (take(self.a.T) * self.scale) @ self.b

    def factors(self) -> "LowRank":  # noqa: D102
        return self


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dense(Update):
    """ΔW = scale · w, an array of the weight's own shape.

    Attributes:
        w: (..., in, out)
        scale: (...)
    """

    formed: ClassVar[bool] = True

    w: Array
    scale: Array

    def delta(self) -> Array:  # noqa: D102
        return self.w * self.scale

    def delta_rows(self, take: Callable[[Array], Array]) -> Array:  # noqa: D102
        return take(self.w) * self.scale


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Kronecker(Update):
    """ΔW = scale · p₁ ⊗ p₂ ⊗ …, applied one piece after the other; the product is not formed.

    Attributes:
        pieces: (..., in_k, out_k) matrices, or low-rank updates for them; Π in_k = in and Π out_k = out.
        scale: (...)

    Example:
        >>> import jax.numpy as jnp
        >>> update = Kronecker((jnp.ones((2, 3)), jnp.ones((4, 5))), scale=jnp.float32(1))
        >>> update.delta().shape, update.delta_matmul(jnp.ones((7, 8))).shape
        ((8, 15), (7, 15))
    """

    pieces: tuple[Array | LowRank, ...]
    scale: Array

    def delta(self) -> Array:  # noqa: D102
        formed, *others = [piece.delta() if isinstance(piece, LowRank) else piece for piece in self.pieces]
        for other in others:
            formed = jnp.kron(formed, other)
        return formed * self.scale

    def delta_matmul(self, x: Array) -> Array:  # noqa: D102
        ins = [piece.a.shape[-1] if isinstance(piece, LowRank) else piece.shape[0] for piece in self.pieces]
        y = x.reshape(*x.shape[:-1], *ins)
        for piece in self.pieces:
            # Each piece consumes the first axis that is left and appends its own output axis.
            y = jnp.moveaxis(y, x.ndim - 1, -1)
            y = piece.delta_matmul(y) if isinstance(piece, LowRank) else y @ piece.astype(x.dtype)
        return y.reshape(*x.shape[:-1], -1) * self.scale.astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dropout(Update):
    """Inverted dropout on the input of another update: y = x·W0 + (x ⊙ mask / (1 - rate))·ΔW.

    It exists only inside a product: merging ignores it, and a weight that has to be formed during training with dropout
    is an error.

    Attributes:
        update: the additive update whose input is dropped.
        key: (...) random keys, one a layer.
        rate: probability that an input feature is dropped.
    """

    update: Update
    key: Array
    rate: float = dataclasses.field(metadata={"static": True})

    def delta(self) -> Array:
        """Refused: dropout acts on an input, and here there is none."""
        raise ValueError(
            "dropout on an adapter's input needs a fused product, but this weight has to be formed; use dropout=0, or "
            "call without dropout_key, or exclude the site (jaxpeft.explain shows which primitive forms it)"
        )

    def delta_matmul(self, x: Array) -> Array:  # noqa: D102
        keep = jax.random.bernoulli(self.key, 1 - self.rate, x.shape)
        return self.update.delta_matmul(jnp.where(keep, x / (1 - self.rate), 0).astype(x.dtype))

    def delta_rows(self, take: Callable[[Array], Array]) -> Array | None:
        """Rows without dropout: a token's one-hot input has nothing to drop but the token."""
        return self.update.delta_rows(take)
