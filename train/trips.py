"""How often does a loop of a compiled program run?"""

import re
from typing import NamedTuple

from train.hlo import Computation, Instruction, Module


class Value(NamedTuple):
    """An integer of a loop: an element of its state, by index, plus an offset; the offset alone without an index."""

    index: int | None
    offset: int


# What is known of a computation's parameter, a loop's state: element -> a value that never changes.
Known = dict[int, int]


def trip_count(module: Module, computation: Computation, loop: Instruction, known: Known) -> int | None:
    """How often a loop's body runs; None if its text does not tell.

    That is XLA's own `known_trip_count`, where the text has it. A TPU's text has not: there the condition compares an
    element of the state with a constant, and the first value and the step are looked up as well, because loops count by
    twos where they are unrolled.

    Args:
      module: the program.
      computation: the one that holds the loop.
      loop: the `while` instruction.
      known: constants in the state of the loop around it.
    """
    if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(found[1])
    condition, body = (module.computations[name] for name in loop.called("condition", "body"))
    constants = loop_constants(module, computation, loop, known)
    compared = _comparison(module, condition, condition.root, {}, constants)
    if compared is None:
        return None
    left, right, direction = compared
    if left.index is None:
        left, right, direction = right, left, direction.translate(str.maketrans("LG", "GL"))
    if left.index is None or right.index is not None:
        return None
    first = _first(module, computation, loop, left.index, known)
    after = _element(module, body, left.index, constants)
    if first is None or after is None or after.index != left.index or not after.offset:
        return None
    step, distance = after.offset, right.offset - left.offset - first
    if direction[0] == "G":
        step, distance = -step, -distance
    if step < 0 and direction != "NE":
        return None
    trips = distance // step + 1 if direction.endswith("E") and direction != "NE" else -(-distance // step)
    return max(trips, 0) if direction in ("LT", "LE", "GT", "GE", "NE") else None


def loop_constants(module: Module, computation: Computation, loop: Instruction, known: Known) -> Known:
    """The elements of a loop's state that keep a constant value: XLA moves constants out of inner loops this way."""
    (name,) = loop.called("body")
    body = module.computations[name]
    found = {}
    for index in range(len(body.instructions[body.root].operands)):
        if _element(module, body, index, {}) == Value(index, 0):
            first = _first(module, computation, loop, index, known)
            if first is not None:
                found[index] = first
    return found


def _first(module: Module, computation: Computation, loop: Instruction, index: int, known: Known) -> int | None:
    state = computation.instructions[loop.operands[0]]
    while state.opcode in ("copy", "opt-barrier"):
        state = computation.instructions[state.operands[0]]
    if state.opcode != "tuple":
        return None
    value = _value(module, computation, state.operands[index], {}, known)
    return None if value is None or value.index is not None else value.offset


def _element(module: Module, body: Computation, index: int, known: Known) -> Value | None:
    """What a loop's body makes of an element of its state."""
    root = body.instructions[body.root]
    return _value(module, body, root.operands[index], {}, known) if root.opcode == "tuple" else None


def _comparison(module, computation, name, arguments, known) -> tuple[Value, Value, str] | None:
    """The two sides and the direction of a loop's condition."""
    instruction = computation.instructions[name]
    if instruction.opcode == "compare":
        left, right = (_value(module, computation, operand, arguments, known) for operand in instruction.operands)
        direction = instruction.attribute("direction") or ""
        return (left, right, direction) if left and right else None
    if instruction.opcode in ("fusion", "call"):
        inner = module.computations[instruction.called("calls", "to_apply")[0]]
        bound = [_value(module, computation, operand, arguments, known) for operand in instruction.operands]
        return _comparison(module, inner, inner.root, dict(enumerate(bound)), known)
    if instruction.opcode in ("copy", "bitcast"):
        return _comparison(module, computation, instruction.operands[0], arguments, known)
    return None


def _value(module, computation, name, arguments, known) -> Value | None:
    """An integer as a constant or an element of the state plus a constant; None for everything else."""
    instruction = computation.instructions[name]
    match instruction.opcode:
        case "constant":
            return Value(None, int(instruction.literal)) if re.fullmatch(r"-?\d+", instruction.literal) else None
        case "parameter":
            return arguments.get(int(instruction.literal))
        case "get-tuple-element" if computation.instructions[instruction.operands[0]].opcode == "parameter":
            index = int(instruction.attribute("index") or 0)
            return Value(None, known[index]) if index in known else Value(index, 0)
        case "copy" | "bitcast" | "convert" | "reshape":
            return _value(module, computation, instruction.operands[0], arguments, known)
        case "add" | "subtract":
            left, right = (_value(module, computation, operand, arguments, known) for operand in instruction.operands)
            if left is None or right is None:
                return None
            if instruction.opcode == "subtract":
                return None if right.index is not None else Value(left.index, left.offset - right.offset)
            if left.index is not None and right.index is not None:
                return None
            return Value(left.index if right.index is None else right.index, left.offset + right.offset)
        case "fusion" | "call":
            inner = module.computations[instruction.called("calls", "to_apply")[0]]
            bound = [_value(module, computation, operand, arguments, known) for operand in instruction.operands]
            return _value(module, inner, inner.root, dict(enumerate(bound)), known)
    return None
