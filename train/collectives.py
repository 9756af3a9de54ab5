"""What does one collective of a compiled program move, between which devices?"""

import re
from dataclasses import dataclass

import numpy as np

from train.hlo import Computation, Instruction, Shape, Tree, integers, leaves

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)


@dataclass(frozen=True)
class Collective:
    """One instruction that moves data between devices.

    Attributes:
      kind: one of `KINDS`.
      operands: what each device puts in; several for a combined one.
      results: what each device gets out.
      group: ids of the first group of devices that exchange data: positions in the flattened mesh. Of a permutation,
        the devices along the first chain or ring.
      times: how often it runs in one execution of the program: the product of the trip counts around it.
      depth: loops around it.
      name: the instruction's.
      op_name: where it comes from: JAX's name stack.
    """

    kind: str
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]
    group: tuple[int, ...]
    times: int = 1
    depth: int = 0
    name: str = ""
    op_name: str = ""

    @property
    def link_bytes(self) -> float:
        """Bytes that one device sends each time it runs, by ring algorithms.

        With n devices in the group: all-gather result·(n-1)/n, reduce-scatter and all-to-all operand·(n-1)/n,
        all-reduce 2·operand·(n-1)/n, permutation and broadcast the operand. A ragged all-to-all sends at most what is
        counted.

        Examples:
          >>> Collective("all-reduce", (Shape("f32", (1024,)),), (Shape("f32", (1024,)),), (0, 1, 2, 3)).link_bytes
          6144.0
        """
        shapes = self.results if self.kind == "all-gather" else self.operands
        moved = sum(shape.bytes for shape in shapes)
        if len(self.group) < 2:
            return 0.0
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(moved)
        share = (len(self.group) - 1) / len(self.group)
        return moved * share * (2 if self.kind == "all-reduce" else 1)


def kind(instruction: Instruction) -> str | None:
    """Which collective an instruction is or starts, if any."""
    opcode = instruction.opcode.removesuffix("-start")
    return opcode if opcode in KINDS else None


def result(instruction: Instruction) -> Tree:
    """The shape of what an instruction computes: the start of an asynchronous one lists operands and state as well."""
    shape = instruction.shape
    if isinstance(shape, Shape) or not instruction.opcode.endswith("-start"):
        return shape
    if kind(instruction) == "all-reduce" and isinstance(shape[0], Shape):  # the one that does not, even if combined
        return shape
    return shape[0] if instruction.opcode == "copy-start" else shape[1]


def repeats(computation: Computation, instruction: Instruction) -> bool:
    """Whether this is a later step of a collective that was started by another instruction.

    A TPU's compiler may run the steps of a collective inside other fusions, even inside loops. Each such fusion repeats
    the instruction with the same `chain_id`; the fusion that starts the chain says so.
    """
    if "chain_id=" not in instruction.attributes:
        return False
    return not any('"AsyncCollectiveStart"' in each.attributes for each in computation.instructions.values())


def read(computation: Computation, instruction: Instruction, devices: int, *, fused: bool) -> Collective:
    """The collective of an instruction.

    Args:
      computation: the one that holds the instruction.
      instruction: a collective, or the start of one.
      devices: of the whole program.
      fused: the computation is a fusion's. There, an all-reduce whose results are only sliced is a reduce-scatter: so
        TPUs write it.
    """
    found = kind(instruction)
    operands = tuple(leaf for each in computation.operands(instruction) for leaf in leaves(each.shape))
    results = leaves(result(instruction))
    if fused and found == "all-reduce" and (slices := _slices(computation, instruction)):
        found, results = "reduce-scatter", slices
    return Collective(
        found, operands, results, group(instruction, devices), name=instruction.name, op_name=instruction.op_name
    )


def _slices(computation: Computation, instruction: Instruction) -> tuple[Shape, ...]:
    """The slices taken of an instruction's results; none if anything else is done with them."""
    found: list[Shape] = []
    for user, position in computation.users[instruction.name]:
        if user.opcode in ("get-tuple-element", "bitcast", "reshape"):
            inner = _slices(computation, user)
            if not inner:
                return ()
            found += inner
        elif user.opcode == "dynamic-slice" and position == 0:
            found += leaves(user.shape)
        else:
            return ()
    return tuple(found)


def group(instruction: Instruction, devices: int) -> tuple[int, ...]:
    """The first group of devices of a collective.

    Raises:
      ValueError: the groups are written in a form that is not known here.
    """
    if pairs := instruction.attribute("source_target_pairs"):
        found = [integers(pair) for pair in re.findall(r"\{([^}]+)\}", pairs)]
        # Pairs that send to themselves say nothing about who takes part.
        targets = {source: target for source, target in found if source != target}
        chain = list(found[0][:1]) if not targets else [next(iter(targets))]
        while (target := targets.get(chain[-1])) is not None and target not in chain:
            chain.append(target)
        return tuple(chain)
    text = re.search(r"replica_groups=(.*)", instruction.attributes)
    groups = text[1] if text else "{}"
    if groups.startswith("{}"):
        return tuple(range(devices))
    if found := re.match(r"\{\{([\d,]+)\}", groups):
        return integers(found[1])
    if groups.startswith("["):
        return tuple(map(int, _iota(groups)[0]))
    if found := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\((.*?\]?)\))? \{([^}]*)\}", groups):
        return _along_axes(*found.groups())
    raise ValueError(f"the replica groups of {instruction.name!r} are not understood: {groups[:80]!r}")


def _iota(text: str) -> np.ndarray:
    """`[4,2]<=[2,4]T(1,0)`: 0, 1, … in the second shape, transposed, in the first shape."""
    found = re.match(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?", text)
    dims = integers(found[1])
    source = integers(found[2]) if found[2] else dims
    ids = np.arange(np.prod(source)).reshape(source)
    return (ids.transpose(integers(found[3])) if found[3] else ids).reshape(dims)


def _along_axes(axes: str, ids: str | None, grouped: str) -> tuple[int, ...]:
    """The first group of `mesh['a'=2,'b'=4] {'b'}`; of an axis `'b':(2)4`, the 4 parts below the 2 major ones."""
    sizes = {name: int(size) for name, size in re.findall(r"([^,=]+)=(\d+)", axes)}
    order = np.arange(np.prod([*sizes.values()]))
    if ids is not None:
        order = _iota(ids).ravel() if ids.startswith("[") else np.array(integers(ids))
    order = order.reshape([*sizes.values()])
    taken = [0]
    strides = dict(zip(sizes, np.array(order.strides) // order.itemsize, strict=True))
    for name, before, size in re.findall(r"([^,:]+)(?::\((\d+)\)(\d+))?", grouped):
        count = int(size) if size else sizes[name]
        step = strides[name] * (sizes[name] // (int(before) * count) if size else 1)
        taken = [position + index * step for position in taken for index in range(count)]
    return tuple(int(order.flat[position]) for position in taken)


def along(group: tuple[int, ...], axes: dict[str, int]) -> tuple[str, ...]:
    """The axes of a mesh that a group of its devices extends along, perhaps over a part of each.

    Examples:
      >>> along((0, 2, 4, 6), {"data": 4, "model": 2})
      ('data',)
    """
    places = np.array(np.unravel_index(group, tuple(axes.values())))
    return tuple(axis for axis, place in zip(axes, places, strict=True) if (place != place[0]).any())
