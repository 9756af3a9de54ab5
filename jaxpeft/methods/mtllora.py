"""MTL-LoRA: multi-task LoRA with task matrices and shared up-projections (Yang et al., arXiv 2410.09437, AAAI 2025)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxpeft import spec as base
from jaxpeft.methods.lora import uniform
from jaxpeft.sites import Group, Sites
from jaxpeft.spec import SHARED
from jaxpeft.updates import LowRank

CARD = base.Card(
    title="MTL-LoRA",
    formula="(alpha / r) · aᵀ Λ_tᵀ Σ_n p_n B_n, p = softmax(w_t / τ), t the task",
    parameters="L · (r · in + N · r · out + T · (r² + N))",
    source="arXiv 2410.09437 §3",
    budget="rank",
    shared="a and B_n by all tasks",
)


@dataclass(frozen=True, kw_only=True)
class Spec(base.Spec):
    """ΔW_t = (alpha / r) · (Λ_t a)ᵀ Σ_n p_tn B_n with p_t = softmax(w_t / τ), for one task t at a time.

    Trained, float32: ``a`` (L, r, in); ``b`` (L, N, r, out), the up-projections; ``task_matrix`` (L, T, r, r), Λ;
    ``task_weights`` (L, T, N), w. Frozen: ``task``, an int32 that all groups share; it starts at 0. It is an array, so
    another task compiles nothing anew: `adapter.replace(constants=mtllora.with_task(adapter.constants, 2))`. All
    examples of a step, and a merged model, are of one task; a step trains what is shared and its own task's rows.

    Start: b = 0, so ΔW = 0; a ~ U(±1/√in), Λ = 1, w ~ U(±1/√N). Parameters: L · (r · in + N · r · out + T · (r² + N))
    a group. Source: arXiv 2410.09437 §3 and its authors' code.

    Attributes:
        rank: r.
        tasks: T.
        projections: N, number of up-projections.
        temperature: τ: the lower, the closer each task comes to one up-projection.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import mtllora
        >>> sites = jaxpeft.find({"q_proj": {"kernel": jnp.zeros((64, 32))}})
        >>> adapter = jaxpeft.init(jax.random.key(0), mtllora.Spec(rank=4, tasks=5, projections=3), sites)
        >>> other = adapter.replace(constants=mtllora.with_task(adapter.constants, 2))
        >>> int(other.constants["shared"]["task"]), jaxpeft.count(adapter) == 4 * 64 + 3 * 4 * 32 + 5 * (16 + 3)
        (2, True)
    """

    rank: int
    tasks: int
    projections: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("rank", "tasks", "projections"):
            base.require(getattr(self, field) >= 1, self, field, "at least 1")
        base.require(self.temperature > 0, self, "temperature", "a positive number")

    def materialized_rank(self, group: Group) -> int:  # noqa: D102
        del group
        return self.rank


def with_task(constants: Mapping, task: int | Array) -> dict:
    """The frozen arrays of an adapter with another task, a number or a traced scalar.

    Nothing can check a traced number: where there is no such task, the updates are NaN.
    """
    shared = constants[SHARED]
    return {**constants, SHARED: {**shared, "task": jnp.asarray(task, shared["task"].dtype)}}


def count(spec: Spec, sites: Sites) -> int:
    """Trained parameters: Σ L · (r · in + N · r · out + T · (r² + N))."""
    rank, tasks, projections = spec.rank, spec.tasks, spec.projections
    return sum(
        g.layers * (rank * (g.in_dim + projections * g.out_dim) + tasks * (rank**2 + projections)) for g in sites
    )


def init(key: Array, spec: Spec, sites: Sites, weights: Any = None) -> tuple[dict, dict]:
    """Trained arrays by group, and the task (frozen); `weights` is not read."""
    del weights
    params = {}
    for g, group_key in zip(sites, jax.random.split(key, len(sites)), strict=True):
        a_key, weights_key = jax.random.split(group_key)
        identities = jnp.broadcast_to(jnp.eye(spec.rank), (g.layers, spec.tasks, spec.rank, spec.rank))
        params[g.name] = {
            "a": uniform(a_key, (g.layers, spec.rank, g.in_dim), g.in_dim),
            "b": jnp.zeros((g.layers, spec.projections, spec.rank, g.out_dim)),
            "task_matrix": identities,
            "task_weights": uniform(weights_key, (g.layers, spec.tasks, spec.projections), spec.projections),
        }
    return params, {SHARED: {"task": jnp.zeros((), jnp.int32)}, **{g.name: {} for g in sites}}


def updates(params: Mapping, constants: Mapping, spec: Spec, sites: Sites) -> dict[str, LowRank]:
    """One `LowRank` a group, of the task that is set."""
    task, made = constants[SHARED]["task"], {}
    for g in sites:
        trained = params[g.name]
        # "fill" makes a task that does not exist NaN; the other modes would silently take another task.
        matrix = jnp.take(trained["task_matrix"], task, axis=1, mode="fill")
        weights = jax.nn.softmax(jnp.take(trained["task_weights"], task, axis=1, mode="fill") / spec.temperature)
        a = jnp.einsum("lsr,lri->lsi", matrix, trained["a"], precision="highest")
        b = jnp.einsum("ln,lnro->lro", weights, trained["b"], precision="highest")
        made[g.name] = LowRank(a, b, constants[g.name]["scale"])
    return made


def check_constants(constants: Mapping, spec: Spec, sites: Sites) -> None:
    """Raises ValueError if there is no such task."""
    del sites
    if not 0 <= (task := int(constants[SHARED]["task"])) < spec.tasks:
        raise ValueError(f"{SHARED}/task: task {task} of {spec.tasks}")
