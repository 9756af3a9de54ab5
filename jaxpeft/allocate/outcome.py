"""What an allocation left: the live ranks, the same update as plain LoRA without the dead ones; and shared factors."""

import jax.numpy as jnp
import numpy as np

from jaxpeft.adapter import Adapter
from jaxpeft.methods import aslora, lora
from jaxpeft.updates import LowRank


def ranks(adapter: Adapter) -> dict[str, np.ndarray]:
    """{group: (L,)}: the live ranks of every weight with a low-rank update, those whose part of ΔW is not zero."""
    return {name: mask.sum(axis=1) for name, mask in live_ranks(adapter).items()}


def compact(adapter: Adapter) -> Adapter:
    """The same update as plain LoRA without the dead ranks; not under jit.

    Args:
        adapter: of any method whose updates are low-rank.

    Returns:
        An adapter of `jaxpeft.methods.lora` with the largest live rank of all weights, the gates multiplied into a.
        Weights with fewer have zeros.

    Raises:
        ValueError: an update is not low-rank.
    """
    live, updates = live_ranks(adapter), adapter.updates()
    rank = max([1, *(int(mask.sum(axis=1).max()) for mask in live.values())])
    params, constants = {}, {}
    for name, update in updates.items():
        if not isinstance(update, LowRank):
            raise ValueError(f"the update of {name} is {type(update).__name__}; only a LowRank has ranks to leave out")
        kept = np.argsort(~live[name], axis=1, kind="stable")[:, :rank, None]
        params[name] = {leaf: jnp.take_along_axis(getattr(update, leaf), kept, axis=1) for leaf in ("a", "b")}
        constants[name] = {"scale": update.scale}
    alpha = adapter.spec.scale(adapter.sites.groups[0]) * rank
    return Adapter(params, constants, lora.Spec(rank=rank, alpha=alpha), adapter.sites)


def merge_most_similar(adapter: Adapter) -> Adapter:
    """One step of ASLoRA's sharing: in every group the two most similar b's become one, their mean; not under jit.

    Call it between training steps, until every group has the spec's number of b's; the same compiled step goes on. The
    mean is at the lower number, and continues with that number's optimizer moments. Similar means close, ‖bᵢ - bⱼ‖
    smallest: our reading, for the paper's measure could not be confirmed.

    Raises:
        ValueError: the adapter is not ASLoRA.
    """
    if not isinstance(adapter.spec, aslora.Spec):
        raise ValueError(f"merge_most_similar shares the b's of aslora, but this adapter is of {adapter.spec}")
    params, constants = dict(adapter.params), dict(adapter.constants)
    for group in adapter.sites:
        b, index = np.asarray(params[group.name]["b"]), np.asarray(constants[group.name]["b_index"])
        used = np.unique(index)
        if len(used) <= adapter.spec.groups:
            continue
        pairs = [(i, j) for i in used for j in used if i < j]
        kept, merged = min(pairs, key=lambda pair: float(np.linalg.norm(b[pair[0]] - b[pair[1]])))
        mean = (b[kept] + b[merged]) / 2
        params[group.name] = {**params[group.name], "b": jnp.asarray(b).at[kept].set(mean)}
        constants[group.name] = {**constants[group.name], "b_index": jnp.where(index == merged, kept, index)}
    return adapter.replace(params=params, constants=constants)


def live_ranks(adapter: Adapter) -> dict[str, np.ndarray]:
    """{group: (L, r)}: the ranks whose part of ΔW is not zero."""
    return {
        name: np.asarray((update.a != 0).any(axis=-1) & (update.b != 0).any(axis=-1))
        for name, update in adapter.updates().items()
        if isinstance(update, LowRank)
    }
