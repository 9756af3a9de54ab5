"""Updates that are structured matrices of any rank: circulant, Toeplitz and low displacement rank.

Each is linear in its vectors, so whoever makes one scales a vector, not the product. The vectors define S of y = S x;
rows multiply kernels from the left, x·ΔW, so ΔW = Sᵀ. Products go through an FFT in float32 or wider, whatever
the dtype of x, because transforms of half precision are missing or incomplete on most backends. `by_path` chooses
between them and ΔW as an array.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array

from jaxpeft.updates import Update

Path = Literal["auto", "fft", "dense"]
PATHS = ("auto", "fft", "dense")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Circulant(Update):
    """Blocks of circulants: block (q, p) of S is C(c[p, q]), C(c)_ij = c_{(i-j) mod n}, so x·ΔW convolves circularly.

    With a single block, p = q = 1, the matrix need not be square: x is padded with zeros to n = max(in, out), and the
    first `out` results are kept.

    Attributes:
        c: (..., p, q, n); p and q blocks of size n along in and out.
        in_dim: in, p · n or, with one block, at most n.
        out_dim: out, likewise.

    Examples:
        >>> import jax.numpy as jnp
        >>> update = Circulant(jnp.arange(3.0)[None, None], in_dim=3, out_dim=3)
        >>> update.delta().T.tolist()
        [[0.0, 2.0, 1.0], [1.0, 0.0, 2.0], [2.0, 1.0, 0.0]]
    """

    c: Array
    in_dim: int = dataclasses.field(metadata={"static": True})
    out_dim: int = dataclasses.field(metadata={"static": True})

    def delta(self) -> Array:  # noqa: D102
        rows, columns = self._block
        blocks = toeplitz(around(self.c, rows, columns), rows)
        return jnp.moveaxis(blocks, -3, -2).reshape(self.in_dim, self.out_dim)

    def delta_matmul(self, x: Array) -> Array:  # noqa: D102
        n, (rows, columns) = self.c.shape[-1], self._block
        blocks = _transformable(x).reshape(*x.shape[:-1], -1, rows)
        x_hat, c_hat = jnp.fft.rfft(blocks, n=n), jnp.fft.rfft(self.c)
        # Of one block it is a product of numbers, of which XLA would make a matrix product a frequency.
        one = self.c.shape[-3] == 1
        spectrum = x_hat * c_hat[0] if one else jnp.einsum("...pf,pqf->...qf", x_hat, c_hat)
        y = jnp.fft.irfft(spectrum, n=n)[..., :columns]
        return y.reshape(*x.shape[:-1], self.out_dim).astype(x.dtype)

    @property
    def _block(self) -> tuple[int, int]:
        return self.in_dim // self.c.shape[-3], self.out_dim // self.c.shape[-2]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Toeplitz(Update):
    """S_ij = t_{i-j}, any in and out; t_0 stands at place in-1 of the vector.

    Attributes:
        t: (..., in + out - 1), from t_{1-in} to t_{out-1}.
        in_dim: in.

    Examples:
        >>> import jax.numpy as jnp
        >>> Toeplitz(jnp.arange(4.0), in_dim=3).delta().T.tolist()
        [[2.0, 1.0, 0.0], [3.0, 2.0, 1.0]]
    """

    t: Array
    in_dim: int = dataclasses.field(metadata={"static": True})

    def delta(self) -> Array:  # noqa: D102
        return toeplitz(self.t, self.in_dim)

    def delta_matmul(self, x: Array) -> Array:  # noqa: D102
        # A Toeplitz matrix is a corner of a circulant of size in + out - 1; of one more, because that is often a prime,
        # for which transforms are slow.
        n, zero = self.t.shape[-1] + 1, jnp.zeros_like(self.t[..., :1])
        c = jnp.concatenate([self.t[..., self.in_dim - 1 :], zero, self.t[..., : self.in_dim - 1]], axis=-1)
        y = jnp.fft.irfft(jnp.fft.rfft(_transformable(x), n=n) * jnp.fft.rfft(c), n=n)
        return y[..., : n - self.in_dim].astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowDisplacementRank(Update):
    """S = Σ_{i≤r} Z₁(g_i)·Z₋₁(h_i), circulant times skew-circulant, both of size n = max(in, out).

    Z₋₁(h)_ij is h_{i-j} on and below the diagonal and -h_{n+i-j} above it. With η = e^{iπ/n} and e_k = η^k,
    Z₋₁(h)·v = Re(conj(e) ⊙ ifft(fft(h ⊙ e) ⊙ fft(v ⊙ e))). A weight that is not square: as for `Circulant`.

    Attributes:
        g: (..., r, n)
        h: (..., r, n)
        in_dim: in.
        out_dim: out.
    """

    g: Array
    h: Array
    in_dim: int = dataclasses.field(metadata={"static": True})
    out_dim: int = dataclasses.field(metadata={"static": True})

    def delta(self) -> Array:  # noqa: D102
        n = self.g.shape[-1]
        skew = toeplitz(around(self.h, self.in_dim, n, sign=-1), self.in_dim)
        circulant = toeplitz(around(self.g, n, self.out_dim), n)
        return jnp.einsum("rin,rno->io", skew, circulant, precision="highest")

    def delta_matmul(self, x: Array) -> Array:  # noqa: D102
        n = self.g.shape[-1]
        e = jnp.exp(1j * math.pi / n * jnp.arange(n, dtype=_transformable(x).dtype))
        v = jnp.fft.fft(_transformable(x) * e[: self.in_dim], n=n)[..., None, :]
        skew = jnp.real(jnp.conj(e) * jnp.fft.ifft(v * jnp.fft.fft(self.h * e)))
        spectrum = jnp.sum(jnp.fft.rfft(skew) * jnp.fft.rfft(self.g), axis=-2)
        return jnp.fft.irfft(spectrum, n=n)[..., : self.out_dim].astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chain(Update):
    """Updates one after the other, ΔW = first · second."""

    first: Update
    second: Update

    def delta(self) -> Array:  # noqa: D102
        return jnp.matmul(self.first.delta(), self.second.delta(), precision="highest")

    def delta_matmul(self, x: Array) -> Array:  # noqa: D102
        return self.second.delta_matmul(self.first.delta_matmul(x))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Formed(Update):
    """Another update, applied by forming its ΔW wherever it is used."""

    formed: ClassVar[bool] = True

    update: Update

    def delta(self) -> Array:  # noqa: D102
        return self.update.delta()


def of_vector(kind: str, vector: Array, in_dim: int, out_dim: int) -> Update:
    """The matrix that one vector defines: ``circulant`` (in blocks), ``symmetric_toeplitz`` or ``toeplitz``."""
    if kind == "circulant":
        return Circulant(vector, in_dim, out_dim)
    return Toeplitz(vector if kind == "toeplitz" else mirrored(vector, in_dim, out_dim), in_dim)


def by_path(path: Path, update: Update, in_dim: int, out_dim: int) -> Update:
    """The update as it is (``fft``), with ΔW formed (``dense``), or the faster of the two (``auto``)."""
    dense = path == "dense" or (path == "auto" and not prefers_fft(in_dim, out_dim))
    return Formed(update) if dense else update


def prefers_fft(in_dim: int, out_dim: int) -> bool:
    """Whether products by FFT beat forming W + ΔW in a training step: measured, `docs/decisions/0006`."""
    return max(in_dim, out_dim) >= 768


def _transformable(x: Array) -> Array:
    """Values in a type that there are transforms of."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def toeplitz(t: Array, rows: int) -> Array:
    """The Toeplitz matrix (..., rows, columns) of t (..., rows + columns - 1): entry (i, o) is t[rows - 1 + o - i].

    Each row is the one above moved by one, so the rows lie side by side in the repeated t, read with a period one
    shorter. Unlike a gather by an index table, its backward is a sum, not a scatter of rows·columns numbers.
    """
    length = t.shape[-1]
    padded = jnp.concatenate([t, jnp.zeros_like(t[..., :1])], axis=-1)
    repeated = jnp.broadcast_to(padded[..., None, :], (*t.shape[:-1], rows, length + 1))
    flat = repeated.reshape(*t.shape[:-1], -1)[..., : rows * length]
    return flat.reshape(*t.shape[:-1], rows, length)[..., rows - 1 :]


def around(c: Array, rows: int, columns: int, sign: int = 1) -> Array:
    """A circulant's vector c (..., n) as that of a Toeplitz matrix, t_d = c_{d mod n}, times `sign` where d < 0."""
    n = c.shape[-1]
    return jnp.concatenate([sign * c[..., n - rows + 1 :], c[..., :columns]], axis=-1)


def mirrored(c: Array, rows: int, columns: int) -> Array:
    """A symmetric Toeplitz matrix's vector c (..., n) as that of any Toeplitz matrix, t_d = c_{|d|}."""
    return jnp.concatenate([c[..., rows - 1 : 0 : -1], c[..., :columns]], axis=-1)
