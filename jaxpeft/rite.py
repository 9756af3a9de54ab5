"""LoRA-RITE: an optimizer whose steps do not depend on how ΔW is factored (Yen et al., arXiv 2410.20625, ICLR 2025).

The same ΔW = aᵀ b has many factors, (Ra)ᵀ (R⁻ᵀ b) for any invertible R, and Adam moves ΔW differently for each. Here
each factor is moved in an orthonormal basis of its partner, where its gradient does not depend on R.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxpeft.sites import paths_and_leaves

if TYPE_CHECKING:
    import optax

PARTNER = {"a": "b", "b": "a"}


class Moments(NamedTuple):
    """What is remembered of one factor, (L, r, n), in the basis of its partner.

    Attributes:
        first: (L, n, r), average of the preconditioned gradients.
        second: (L, r, r), average of their unpreconditioned products.
        escaped: (L,), a bound of what changes of the basis took from `second`.
        basis: (L, m, r), the basis, orthonormal columns.
    """

    first: Array
    second: Array
    escaped: Array
    basis: Array


class RiteState(NamedTuple):
    """State of `scale_by_rite`: the number of updates, and {group: {factor: moments}}."""

    count: Array
    moments: dict[str, dict[str, Moments]]


def rite(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    escape: bool = True,
    clip: float = 1.0,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """LoRA-RITE, for parameters that are pairs of factors: LoRA's, not pools that many weights share.

    For a factor with gradient G (n, r), transposed to columns, and a partner whose QR decomposition is Q R:

        U = G R⁺, the unmagnified gradient, P = Qᵀ Q_old
        V ← β₂ P V Pᵀ + (1 - β₂) Uᵀ U / n
        ρ ← β₂ (ρ + what P took from V), min(max λᵢ(V) - λᵢ(P V Pᵀ), tr V - tr P V Pᵀ)
        M ← β₁ M Pᵀ + (1 - β₁) U ((V + ρ I)^½ + eps I)⁻¹
        factor ← factor - learning_rate · M R⁻ᵀ

    The decays are corrected for the zero start. While b is zero, as LoRA starts, R⁺ = 0 and a does not move.

    Args:
        learning_rate: a number or a schedule.
        b1: β₁.
        b2: β₂.
        eps: added to the square roots.
        escape: whether to add ρ, as in the paper; its authors' code leaves it out by default.
        clip: largest norm of all unmagnified gradients together, 0 for none; from the authors' code. That code also
            drops, silently, every unmagnified gradient whose root mean square exceeds one, which is not done here.
        weight_decay: decoupled weight decay, which depends on the factors.

    Returns:
        The optimizer.

    Raises:
        ValueError: from `init`, if the parameters are anything but {group: {"a": (L, r, in), "b": (L, r, out)}}.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import lora
        >>> from jaxpeft.rite import rite
        >>> sites = jaxpeft.find({"up": {"kernel": jnp.zeros((64, 32))}})
        >>> adapter = jaxpeft.init(jax.random.key(0), lora.Spec(rank=4), sites)
        >>> state = rite(1e-3).init(adapter.params)
        >>> state[0].moments["up/kernel"]["a"].second.shape
        (1, 4, 4)
    """
    import optax  # Here, because it takes long to import.

    return optax.chain(
        scale_by_rite(b1, b2, eps, escape, clip),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_rite(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    escape: bool = True,
    clip: float = 1.0,
) -> optax.GradientTransformation:
    """The direction of LoRA-RITE; see `rite`."""
    import optax

    def init(params: Any) -> RiteState:
        _check(params)
        moments = {
            name: {
                factor: Moments(
                    first=jnp.zeros_like(_columns(group[factor])),
                    second=jnp.zeros((*group[factor].shape[:2], group[factor].shape[1])),
                    escaped=jnp.zeros(len(group[factor])),
                    basis=jnp.zeros_like(_columns(group[partner])),
                )
                for factor, partner in PARTNER.items()
            }
            for name, group in params.items()
        }
        return RiteState(jnp.zeros((), jnp.int32), moments)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, RiteState]:
        if params is None:
            raise ValueError("LoRA-RITE needs the parameters: optimizer.update(gradients, state, params)")
        bases, inverses, unmagnified = {}, {}, {}
        for name, group in params.items():
            for factor, partner in PARTNER.items():
                basis, triangle = jnp.linalg.qr(_columns(group[partner]))
                inverse = jnp.linalg.pinv(triangle)
                gradient = _columns(updates[name][factor]) @ inverse
                bases[name, factor], inverses[name, factor], unmagnified[name, factor] = basis, inverse, gradient
        if clip:
            norm = optax.tree.norm(list(unmagnified.values()))
            unmagnified = {key: leaf * jnp.minimum(1, clip / norm) for key, leaf in unmagnified.items()}

        decays = _corrected(b1, state.count), _corrected(b2, state.count)
        directions: dict[str, dict[str, Array]] = {name: {} for name in params}
        moments: dict[str, dict[str, Moments]] = {name: {} for name in params}
        for name, factor in unmagnified:
            old, key = state.moments[name][factor], (name, factor)
            new = _remember(old, unmagnified[key], bases[key], decays, eps, escape)
            moments[name][factor] = new
            directions[name][factor] = jnp.swapaxes(new.first @ jnp.swapaxes(inverses[key], 1, 2), 1, 2)
        return directions, state._replace(count=optax.safe_increment(state.count), moments=moments)

    return optax.GradientTransformation(init, update)


def _remember(
    old: Moments, gradient: Array, basis: Array, decays: tuple[Array, Array], eps: float, escape: bool
) -> Moments:
    """The moments with one more unmagnified gradient (L, n, r), in a new basis."""
    b1, b2 = decays
    turn = jnp.swapaxes(basis, 1, 2) @ old.basis
    carried = _symmetric(turn @ old.second @ jnp.swapaxes(turn, 1, 2))
    escaped = jnp.zeros_like(old.escaped)
    if escape:
        largest = jnp.max(jnp.linalg.eigvalsh(old.second) - jnp.linalg.eigvalsh(carried), axis=-1)
        total = jnp.trace(old.second - carried, axis1=1, axis2=2)
        escaped = b2 * (old.escaped + jnp.maximum(jnp.minimum(largest, total), 0))
    product = jnp.swapaxes(gradient, 1, 2) @ gradient / gradient.shape[1]
    second = _symmetric(b2 * carried + (1 - b2) * product)
    values, vectors = jnp.linalg.eigh(second)
    # Rounding may leave an eigenvalue just below zero.
    roots = jnp.sqrt(jnp.maximum(values + escaped[:, None], 0)) + eps
    preconditioned = gradient @ (vectors / roots[:, None, :]) @ jnp.swapaxes(vectors, 1, 2)
    first = b1 * old.first @ jnp.swapaxes(turn, 1, 2) + (1 - b1) * preconditioned
    return Moments(first, second, escaped, basis)


def _corrected(decay: float, count: Array) -> Array:
    """The decay of an average that starts from nothing: 0 at first, then up to `decay`."""
    step = count + 1.0
    return decay * (1 - decay ** (step - 1)) / (1 - decay**step)


def _columns(factor: Array) -> Array:
    """(L, r, n) -> (L, n, r)."""
    return jnp.swapaxes(factor, 1, 2)


def _symmetric(matrices: Array) -> Array:
    return (matrices + jnp.swapaxes(matrices, 1, 2)) / 2


def _check(params: Any) -> None:
    """Raises ValueError unless the parameters are pairs of factors."""

    def pair(group: Any) -> bool:
        if not isinstance(group, Mapping) or group.keys() != PARTNER.keys():
            return False
        a, b = group["a"], group["b"]
        return a.ndim == b.ndim == 3 and a.shape[:2] == b.shape[:2] and a.shape[1] <= min(a.shape[2], b.shape[2])

    if not (isinstance(params, Mapping) and params and all(pair(group) for group in params.values())):
        found = ", ".join(f"{path} {jax.numpy.shape(leaf)}" for path, leaf in paths_and_leaves(params))
        raise ValueError(
            "LoRA-RITE needs pairs of factors, a (L, r, in) and b (L, r, out) in every group and r at most in and out; "
            f"in a pool a vector has many partners. Found {found}"
        )
