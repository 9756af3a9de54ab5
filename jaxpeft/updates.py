"""What a method yields: the update of a weight, and the ways to apply it without forming it.

Every array of an update leads with the group's layers, or with an axis of size 1 if it serves them all; the engine
maps the functions below over them, so each speaks of one (in, out) weight. A new structure overrides `delta` and
`delta_matmul`; one that multiplies or rescales the frozen weight overrides `materialize` and `matmul`, which receive
it. Where all arrays of an update are zero it must change nothing: that is how the layers that are not adapted are
filled in a stacked array.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from jaxpeft import thin


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
        on_output: it changes what the layer gives out, not its weight; then `transform` is all it has.
        axes: one letter an axis behind the layers, for arrays with an axis of the weight's ``i`` or ``o`` features,
            as in ``{"a": "ri"}``: on a mesh they are split as the weight is. Of an update inside this one ``"io"`` says
            that it has the same two sides. What is not listed stays whole.
    """

    additive: ClassVar[bool] = True
    formed: ClassVar[bool] = False
    on_output: ClassVar[bool] = False
    axes: ClassVar[Mapping[str, str]] = {}

    def delta(self) -> Array:
        """ΔW, (in, out), float32 or as wide as the update's arrays."""
        raise NotImplementedError(f"{type(self).__name__}.delta")

    def delta_matmul(self, x: Array) -> Array:
        """x·ΔW for x (..., in), in the dtype of x."""
        return x @ self.delta().astype(x.dtype)

    def delta_rows(self, take: Callable[[Array], Array]) -> Array | None:
        """Rows of ΔW, for an embedding; `take` picks the same rows of any (in, k) matrix. None if ΔW must be formed."""
        del take
        return None

    def materialize(self, weight: Array) -> Array:
        """W' as an (in, out) matrix, from W0 in float32 or wider."""
        return weight + self.delta()

    def matmul(self, x: Array, base: Base) -> Array:
        """x·W' for x (..., in)."""
        y = base.dot(x)
        return y + self.delta_matmul(x).astype(y.dtype)

    def transform(self, y: Array) -> Array:
        """What an update `on_output` makes of the layer's output (..., out)."""
        raise NotImplementedError(f"{type(self).__name__}.transform")

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

    Examples:
        >>> import jax.numpy as jnp
        >>> update = LowRank(a=jnp.ones((2, 3)), b=jnp.ones((2, 5)), scale=jnp.float32(0.5))
        >>> update.delta().shape, float(update.delta()[0, 0])
        ((3, 5), 1.0)
    """

    axes: ClassVar[Mapping[str, str]] = {"a": "ri", "b": "ro"}

    a: Array
    b: Array
    scale: Array

    def delta(self) -> Array:  # noqa: D102
        return jnp.einsum("ri,ro->io", self.a * self.scale, self.b, precision="highest")

    def delta_matmul(self, x: Array) -> Array:  # noqa: D102
        hidden = jnp.einsum("...i,ri->...r", x, self.a.astype(x.dtype))
        return thin.times(hidden * self.scale.astype(x.dtype), self.b.astype(x.dtype))

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
    axes: ClassVar[Mapping[str, str]] = {"w": "io"}

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

    Examples:
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
        return y.reshape(*x.shape[:-1], math.prod(y.shape[x.ndim - 1 :])) * self.scale.astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dropout(Update):
    """Inverted dropout around another update, as y = x·W0 + drop(x)·ΔW on its input.

    It exists only inside a product: merging ignores it, and a weight that has to be formed during training with dropout
    is an error.

    Attributes:
        update: the additive update that is dropped.
        key: (...) random keys, one a layer.
        rate: probability to be dropped.
        on: ``input`` x, the ``factors`` a and b, or the ``update`` x·ΔW.
        pattern: each ``element``; a feature over all tokens, ``column``; a token over all features, ``key``.
    """

    update: Update
    key: Array
    rate: float = dataclasses.field(metadata={"static": True})
    on: str = dataclasses.field(default="input", metadata={"static": True})
    pattern: str = dataclasses.field(default="element", metadata={"static": True})

    def delta(self) -> Array:
        """Refused: dropout acts inside a product, and here there is none."""
        raise ValueError(
            "dropout on an adapter needs a fused product, but this weight has to be formed; use dropout=0, or "
            "call without dropout_key, or exclude the site (jaxpeft.explain shows which primitive forms it)"
        )

    def delta_matmul(self, x: Array) -> Array:  # noqa: D102
        if self.on == "input":
            return self.update.delta_matmul(self._drop(x, self.key))
        if self.on == "update":
            return self._drop(self.update.delta_matmul(x), self.key)
        factors = self.update.factors()
        if factors is None:
            raise ValueError(f"dropout_on='factors' needs a product of two factors, not {type(self.update).__name__}")
        key_a, key_b = jax.random.split(self.key)
        dropped = LowRank(self._drop(factors.a, key_a), self._drop(factors.b, key_b), factors.scale)
        return dropped.delta_matmul(x)

    def delta_rows(self, take: Callable[[Array], Array]) -> Array | None:
        """Rows without dropout: a token's one-hot input has nothing to drop but the token."""
        return self.update.delta_rows(take)

    def _drop(self, x: Array, key: Array) -> Array:
        """Keeps the mean: what stays is divided by the share that stays. Rows of x are tokens, or ranks of a factor."""
        shape = list(x.shape)
        if self.pattern == "column" and x.ndim > 1:
            shape[-2] = 1
        if self.pattern == "key":
            shape[-1] = 1
        keep = jax.random.bernoulli(key, 1 - self.rate, shape)
        return jnp.where(keep, x / (1 - self.rate), 0).astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Decomposed(Update):
    """DoRA: W' = (W0 + ΔW) · diag(magnitude / ‖W0 + ΔW‖), the norm of each output's weights, held constant in backward.

    Source: arXiv 2402.09353 §4.1 and §4.3. Where ΔW is low-rank the norms come from the factors, without W0 + ΔW:
    ‖w + s·Σ_k b_k a_k‖² = ‖w‖² + 2 s Σ_k b_k ⟨w, a_k⟩ + s² Σ_kl b_k b_l ⟨a_k, a_l⟩ for each output's column w.

    Attributes:
        update: the additive update, possibly with dropout.
        magnitude: (..., out)
        present: (...) 1; 0 where a stacked array has layers that are not adapted.
    """

    additive: ClassVar[bool] = False
    axes: ClassVar[Mapping[str, str]] = {"update": "io", "magnitude": "o"}

    update: Update
    magnitude: Array
    present: Array

    def norm(self, weight: Array) -> Array:
        """‖W0 + ΔW‖ of every output, (out,), float32 as the magnitude is, so that at the start their ratio is 1."""
        update = self.update.update if isinstance(self.update, Dropout) else self.update
        weight, factors = weight.astype(jnp.promote_types(weight.dtype, jnp.float32)), update.factors()
        if factors is None:
            return jnp.linalg.norm(weight + update.delta(), axis=0).astype(jnp.float32)
        a, b = factors.a * factors.scale, factors.b
        mixed = jnp.einsum("ri,io->ro", a, weight, precision="highest")
        gram = jnp.einsum("ri,si->rs", a, a, precision="highest")
        squared = jnp.sum(weight**2, axis=0) + 2 * jnp.sum(mixed * b, axis=0) + jnp.sum((gram @ b) * b, axis=0)
        return jnp.sqrt(jnp.maximum(squared, 0)).astype(jnp.float32)

    def rescale(self, weight: Array) -> Array:
        """Factor of every output, (out,)."""
        norm = jax.lax.stop_gradient(self.norm(weight))
        return jnp.where((self.present > 0) & (norm > 0), self.magnitude / jnp.where(norm > 0, norm, 1), 1)

    def materialize(self, weight: Array) -> Array:  # noqa: D102
        return self.update.materialize(weight) * self.rescale(weight)

    def matmul(self, x: Array, base: Base) -> Array:  # noqa: D102
        y = self.update.matmul(x, base)
        return y * self.rescale(base.weight).astype(y.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Block(Update):
    """An adapter behind a layer: h' = h + σ(h·S) + β, where h is the layer's output and S a structured square update.

    Attributes:
        update: S, an additive update (..., out, out), possibly with dropout.
        bias: β, (..., out)
        activation: σ, by its name in `jax.nn`, or ``identity``; σ(0) = 0.
    """

    additive: ClassVar[bool] = False
    on_output: ClassVar[bool] = True
    axes: ClassVar[Mapping[str, str]] = {"bias": "o"}

    update: Update
    bias: Array
    activation: str = dataclasses.field(metadata={"static": True})

    def transform(self, y: Array) -> Array:  # noqa: D102
        return y + (getattr(jax.nn, self.activation)(self.update.delta_matmul(y)) + self.bias).astype(y.dtype)

    def materialize(self, weight: Array) -> Array:
        """Refused: a non-linearity lies between the weight and what the adapter gives."""
        raise ValueError(
            "this adapter acts on a layer's output through a non-linearity, so there is no W' to form or to merge; "
            "keep it and call the model through jaxpeft.adapt, or use methods.surm, which changes the weight itself"
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PerShard(Update):
    """One copy of an update for each shard of the batch, so that each shard's gradients go to its own copy.

    On a mesh the copies lie on the devices of their shards. Then no product needs a collective for the gradients of its
    factors, and they are summed where the copies came from: over a pool's few numbers instead of a factor's many.

    A shard is one of equal runs of the first axis of x. Where x has no such axis, or the weight is formed, the first
    copy serves all; the result is the same, the gradients just travel further.

    Attributes:
        update: its arrays are (..., shards, …).
        mesh: where the copies lie; None for the mesh of the context.
        axis: the mesh axes that the copies and the first axis of x are split over.
    """

    update: Update
    mesh: Mesh | None = dataclasses.field(metadata={"static": True})
    axis: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @property
    def additive(self) -> bool:  # noqa: D102  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.update.additive

    @property
    def on_output(self) -> bool:  # noqa: D102  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.update.on_output

    def delta(self) -> Array:  # noqa: D102
        return _first(self.update).delta()

    def delta_matmul(self, x: Array) -> Array:  # noqa: D102
        return self._by_shard(lambda update, x: update.delta_matmul(x), x)

    def delta_rows(self, take: Callable[[Array], Array]) -> Array | None:  # noqa: D102
        return _first(self.update).delta_rows(take)

    def materialize(self, weight: Array) -> Array:  # noqa: D102
        return _first(self.update).materialize(weight)

    def matmul(self, x: Array, base: Base) -> Array:  # noqa: D102
        return self._by_shard(lambda update, x: update.matmul(x, base), x)

    def transform(self, y: Array) -> Array:  # noqa: D102
        return self._by_shard(lambda update, y: update.transform(y), y)

    def _by_shard(self, function: Callable[[Update, Array], Array], x: Array) -> Array:
        shards = jax.tree.leaves(self.update)[0].shape[0]
        if x.ndim < 2 or x.shape[0] % shards:
            return function(_first(self.update), x)
        # Not a vmap: XLA keeps most of a mapped axis on its devices, but gathers it for an FFT.
        return jax.shard_map(
            lambda update, x: function(_first(update), x),
            mesh=self.mesh,
            in_specs=PartitionSpec(self.axis),
            out_specs=PartitionSpec(self.axis),
            axis_names=set(self.axis),
            check_vma=False,
        )(self.update, x)


def _first(update: Update) -> Update:
    """The first of the copies that lead an update's arrays."""
    return jax.tree.map(lambda leaf: leaf[0], update)
