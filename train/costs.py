"""What does a compiled program do, on each device? Arithmetic, memory traffic, data between devices.

XLA's own analysis counts the body of a loop once; here it counts as often as it runs, which a model whose layers are
scanned needs. Only text is read: `analyse(compiled.as_text())`, of a program compiled for CPU, TPU or GPU.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from train import collectives, hlo, matrices, traffic, trips
from train.collectives import Collective
from train.hlo import Computation, Instruction, Module


@dataclass(frozen=True)
class Costs:
    """What one execution of a program takes, on each device.

    Attributes:
      flops: 2·M·N·K of every matrix product and the like of every convolution. Elementwise arithmetic, reductions and
        what happens inside kernels that are not HLO are left out.
      memory_bytes: estimated bytes to and from main memory: what each instruction outside of fusions reads and writes.
        Of an operand that is only sliced or gathered from, the slices count; of an array that is updated in place, the
        update. An array that several instructions read counts for each; the padding of tiles is ignored. What a TPU
        keeps in VMEM is left out, but a program compiled with little effort keeps most of that in main memory: then
        this is an upper bound.
      collectives: the instructions that move data between devices.
      unknown_loops: loops whose trip count the text does not tell: they count as running once.
    """

    flops: float = 0.0
    memory_bytes: float = 0.0
    collectives: tuple[Collective, ...] = ()
    unknown_loops: int = 0

    @classmethod
    def total(cls, parts: Iterable["Costs"]) -> "Costs":
        """The sum of the parts."""
        parts = list(parts)
        return cls(
            math.fsum(part.flops for part in parts),
            math.fsum(part.memory_bytes for part in parts),
            tuple(each for part in parts for each in part.collectives),
            sum(part.unknown_loops for part in parts),
        )

    def repeated(self, times: int) -> "Costs":
        """The costs of a loop around this."""
        inside = (replace(each, times=each.times * times, depth=each.depth + 1) for each in self.collectives)
        return Costs(self.flops * times, self.memory_bytes * times, tuple(inside), self.unknown_loops)

    def link_bytes(self) -> dict[str, float]:
        """Kind of collective -> bytes that one device sends in one execution, the largest first."""
        found: Counter[str] = Counter()
        for each in self.collectives:
            found[each.kind] += each.link_bytes * each.times
        return dict(found.most_common())


def analyse(text: str) -> Costs:
    """The costs of a program.

    Of a conditional, the most expensive branch counts.

    Args:
      text: `compiled.as_text()`, the partitioned program of one device.

    Raises:
      ValueError: the text is no HLO module, or holds a form that is not understood where guessing would mislead.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> matmul = jax.jit(jnp.matmul).lower(jnp.ones((4, 8)), jnp.ones((8, 16))).compile()
      >>> analyse(matmul.as_text()).flops
      1024.0
    """
    module = hlo.parse(text)
    return _computation(module, module.entry, {}, fused=False)


def _computation(module: Module, computation: Computation, known: trips.Known, *, fused: bool) -> Costs:
    """The costs of a computation; inside of fusions, nothing goes through main memory."""
    return Costs.total(
        _instruction(module, computation, instruction, known, fused=fused)
        for instruction in computation.instructions.values()
    )


def _instruction(
    module: Module, computation: Computation, one: Instruction, known: trips.Known, *, fused: bool
) -> Costs:
    """The costs of an instruction with everything it calls."""

    def called(*attributes: str, known: trips.Known, fused: bool) -> list[Costs]:
        found = (module.computations.get(name) for name in one.called(*attributes))
        return [_computation(module, each, known, fused=fused) for each in found if each is not None]

    if one.opcode == "while":
        times = trips.trip_count(module, computation, one, known)
        inside = trips.loop_constants(module, computation, one, known)
        body = Costs.total(called("body", "condition", known=inside, fused=fused))
        return replace(body.repeated(1 if times is None else times), unknown_loops=body.unknown_loops + (times is None))
    if one.opcode == "conditional":
        names = ("branch_computations", "true_computation", "false_computation")
        branches = called(*names, known={}, fused=fused)
        return max(branches, key=lambda branch: (branch.flops, branch.memory_bytes), default=Costs())
    if one.opcode == "call":
        return Costs.total(called("to_apply", known={}, fused=fused))
    memory = 0.0 if fused else traffic.memory_bytes(module, computation, one)
    if collectives.kind(one):
        if collectives.repeats(computation, one):
            return Costs()
        found = collectives.read(computation, one, module.devices, fused=fused)
        return Costs(memory_bytes=memory, collectives=(found,))
    own = Costs(matrices.flops(computation, one), memory)
    # Newer TPUs have collectives carried out by other cores: a call that starts, to a computation that holds just one.
    applied = ["to_apply"] if one.opcode == "call-start" else []
    inner = called("calls", "called_computations", *applied, known={}, fused=True)
    return Costs.total([own, *inner]) if inner else own
