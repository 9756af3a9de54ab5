"""What does the text of a compiled program say? Computations, instructions, shapes, and how often loops run.

Reads `compiled.as_text()`, XLA's optimised and partitioned HLO, of the CPU, TPU and GPU backends.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, TypeAlias


class Shape(NamedTuple):
    """An array's type; `hbm` says whether it lives in the device's main memory, as opposed to VMEM, SMEM or the host's.

    Examples:
      >>> Shape("bf16", (4, 8)).bytes
      64
    """

    dtype: str
    dims: tuple[int, ...]
    hbm: bool = True

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes, without the padding of tiled layouts."""
        bits = re.match(r"[a-z]+(\d+)", self.dtype)  # tokens have none
        return -(-self.size * (int(bits[1]) if bits else 8 * (self.dtype == "pred")) // 8)


Tree: TypeAlias = "Shape | tuple[Tree, ...]"


def leaves(tree: Tree) -> tuple[Shape, ...]:
    """The arrays of a tuple, in order."""
    return (tree,) if isinstance(tree, Shape) else tuple(leaf for branch in tree for leaf in leaves(branch))


def integers(text: str | None) -> tuple[int, ...]:
    """The integers of a list as HLO writes it: `0,1`, or `"0","1"`; none of no text."""
    return tuple(map(int, re.findall(r"-?\d+", text or "")))


@dataclass(slots=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: unique in the module.
      opcode: `dot`, `fusion`, `all-gather-start`, …
      shape: of the result; a tuple of shapes for several.
      operands: their names.
      literal: what stands between the parentheses: a constant's value, a parameter's number.
      attributes: what stands behind them, as text.
    """

    name: str
    opcode: str
    shape: Tree
    operands: list[str]
    literal: str
    attributes: str

    def attribute(self, name: str) -> str | None:
        """The attribute's text: a word, or what braces hold."""
        found = re.search(rf"(?<![\w-]){name}=(?:{{([^{{}}]*(?:{{[^{{}}]*}}[^{{}}]*)*)}}|([^,\s]+))", self.attributes)
        return None if found is None else found[1] if found[2] is None else found[2]

    def called(self, *names: str) -> list[str]:
        """The computations that these attributes name."""
        return [word.strip(" %") for name in names for word in (self.attribute(name) or "").split(",") if word.strip()]

    @property
    def op_name(self) -> str:
        """Where the instruction comes from: JAX's name stack."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found[1] if found else ""


@dataclass
class Computation:
    """Instructions in the order of the schedule, by name; `root` is the result's."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    def operands(self, instruction: Instruction) -> Iterator[Instruction]:
        """The instructions an instruction takes."""
        return (self.instructions[name] for name in instruction.operands if name in self.instructions)

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Number -> parameter."""
        found = (each for each in self.instructions.values() if each.opcode == "parameter")
        return {int(each.literal): each for each in found}

    @cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """Name -> the instructions that take it, and as which of their operands."""
        found: dict[str, list[tuple[Instruction, int]]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for position, operand in enumerate(instruction.operands):
                found.setdefault(operand, []).append((instruction, position))
        return found


@dataclass
class Module:
    """A program: its computations by name, the first one to run, and how many devices run it together."""

    computations: dict[str, Computation]
    entry: Computation
    devices: int


def parse(text: str) -> Module:
    r"""Reads a program.

    Raises:
      ValueError: the text is no HLO module.

    Examples:
      >>> module = parse("HloModule m\n\nENTRY %e (x: f32[2]) -> f32[2] {\n"
      ...                "  %x = f32[2]{0} parameter(0)\n  ROOT %y = f32[2]{0} add(%x, %x)\n}")
      >>> module.entry.instructions["y"].operands
      ['x', 'x']
    """
    if not text.lstrip().startswith("HloModule"):
        raise ValueError(f"not the text of an HLO module, which starts with 'HloModule': {text[:60]!r}")
    # With tiled layouts, a TPU's, space 1 is VMEM; a GPU's 1 is a part of its memory that collectives may use.
    main_memory = ("0",) if ":T(" in text else ("0", "1")
    computations: dict[str, Computation] = {}
    computation, entry = None, None
    for line in text.splitlines():
        if computation is None:
            if line.endswith("{") and (found := _HEADER.match(line)):
                computation = computations[found[2]] = Computation(found[2])
                entry = computation if found[1] else entry
        elif line.startswith("}"):
            computation = None
        elif found := _INSTRUCTION.match(line):
            instruction = _instruction(found[2], line[found.end() :], main_memory)
            computation.instructions[instruction.name] = instruction
            if found[1] or not computation.root:
                computation.root = instruction.name
    if entry is None:
        raise ValueError("an HLO module without an ENTRY computation: is its text complete?")
    counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", text[: text.find("\n")])
    return Module(computations, entry, math.prod(map(int, counts)))


_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"(\w+)\[([^\]]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")


def _instruction(name: str, rest: str, main_memory: tuple[str, ...]) -> Instruction:
    """The instruction of a line, from behind its ` = `."""
    shape, end = _shape(rest, 0, main_memory)
    opcode = _OPCODE.match(rest, end)
    if opcode is None:
        raise ValueError(f"no opcode in the HLO instruction {name!r}: {rest[:80]!r}")
    close = _closing(rest, opcode.end())
    literal = rest[opcode.end() : close]
    if opcode[1] in ("constant", "parameter", "iota"):
        operands = []
    elif "%" in literal:
        operands = re.findall(r"%([\w.\-]+)", literal)
    else:  # Printed without the signs, perhaps with types: the name is the last word of each.
        bare = re.sub(r"/\*.*?\*/|\[[^\]]*\]|\{[^}]*\}", "", literal)
        operands = [word.split()[-1].strip("()") for word in bare.split(",") if word.strip()]
    return Instruction(name, opcode[1], shape, operands, literal, rest[close + 1 :])


def _shape(text: str, start: int, main_memory: tuple[str, ...]) -> tuple[Tree, int]:
    """The shape at a position of a text, and where it ends."""
    if text.startswith("(", start):
        branches, position = [], start + 1
        while (skipped := re.compile(r"(?:,|\s|/\*.*?\*/)*").match(text, position)) and text[skipped.end()] != ")":
            branch, position = _shape(text, skipped.end(), main_memory)
            branches.append(branch)
        return tuple(branches), skipped.end() + 1
    found = _ARRAY.match(text, start)
    if found is None:
        raise ValueError(f"no shape in an HLO instruction: {text[start : start + 80]!r}")
    space = _SPACE.search(found[3]) if found[3] else None
    return Shape(found[1], integers(found[2]), space is None or space[1] in main_memory), found.end()


def _closing(text: str, position: int) -> int:
    """Where the parenthesis closes that opens just before a position."""
    depth = 1
    for found in re.finditer(r'[()]|"(?:[^"\\]|\\.)*"', text[position:]):
        depth += {"(": 1, ")": -1}.get(found[0], 0)
        if depth == 0:
            return position + found.start()
    return len(text)
