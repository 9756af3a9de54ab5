"""How many bytes does an instruction of a compiled program move to and from main memory?"""

from train import collectives
from train.hlo import Computation, Instruction, Module, Shape, leaves

# Nothing is moved, or what is called inside moves it.
_FREE = {
    "add-dependency",
    "after-all",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "domain",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
    "while",
}
_FREE_CALLS = ('"AllocateBuffer"', '"ConcatBitcast"')
_SLICES = ("dynamic-slice", "gather", "slice")
# Inside of a fusion, these are done to the elements that are asked for, not to whole arrays.
_RENAMES = ("bitcast", "convert", "copy", "get-tuple-element", "reshape", "transpose")


def memory_bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Bytes that an instruction outside of fusions reads and writes: an estimate.

    Operands and results in main memory count whole, except: of an operand that is only sliced or gathered from, the
    slices count; of an array that is updated in place, the update, read and written.
    """
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0.0
    if opcode == "custom-call" and any(name in instruction.attributes for name in _FREE_CALLS):
        return 0.0
    operands = [leaf for each in computation.operands(instruction) for leaf in leaves(each.shape)]
    results = leaves(collectives.result(instruction))
    opcode = opcode.removesuffix("-start")
    if opcode in _SLICES:
        read = _main(operands[0], sum(leaf.bytes for leaf in results)) + sum(_main(leaf) for leaf in operands[1:])
        return read + sum(_main(leaf) for leaf in results)
    if opcode in ("dynamic-update-slice", "scatter"):
        update = operands[1] if opcode == "dynamic-update-slice" else operands[-1]
        return _main(update) + _main(operands[0], update.bytes)
    if opcode == "fusion":
        inner = module.computations[instruction.called("calls")[0]]
        read = sum(
            _read(module, inner, inner.parameters[number].name)
            for number, operand in enumerate(computation.operands(instruction))
            if number in inner.parameters and any(leaf.hbm for leaf in leaves(operand.shape))
        )
        return float(read + _written(module, inner, inner.root, results))
    return float(sum(_main(leaf) for leaf in (*operands, *results)))


def _main(shape: Shape, size: int | None = None) -> int:
    """Its bytes, or the given ones of them, if it is in main memory."""
    return (shape.bytes if size is None else min(size, shape.bytes)) if shape.hbm else 0


def _read(module: Module, computation: Computation, name: str) -> int:
    """Bytes that a fusion reads of one of its parameters, or of one of its values that stands for a parameter."""
    shape, *others = leaves(computation.instructions[name].shape)
    whole = shape.bytes + sum(leaf.bytes for leaf in others)
    read = 0.0
    for user, position in computation.users[name]:
        if user.opcode in _SLICES and position == 0:
            read += shape.bytes / max(shape.size, 1) * leaves(user.shape)[0].size
        elif user.opcode in _RENAMES:
            read += _read(module, computation, user.name)
        elif user.opcode == "fusion":
            inner = module.computations[user.called("calls")[0]]
            parameter = inner.parameters[position].name
            read += _read(module, inner, parameter)
            if _renamed(inner, parameter, inner.root):
                read += _read(module, computation, user.name)
        elif not (
            user.opcode == "tuple"
            or (user.opcode == "dynamic-update-slice" and position == 0 and _is_result(computation, user))
            or (collectives.kind(user) and collectives.repeats(computation, user))
        ):
            read += whole
    return int(min(read, whole))


def _renamed(computation: Computation, name: str, root: str) -> bool:
    """Whether a value is what a computation returns, but for its name and order."""
    instruction = computation.instructions[root]
    if root == name:
        return True
    return instruction.opcode in _RENAMES and _renamed(computation, name, instruction.operands[0])


def _is_result(computation: Computation, instruction: Instruction) -> bool:
    """Whether a value is the fusion's result, or a part of it, and nothing else."""
    users = computation.users[instruction.name]
    return instruction.name == computation.root or (
        bool(users) and all(user.opcode in ("bitcast", "tuple") and _is_result(computation, user) for user, _ in users)
    )


def _written(module: Module, computation: Computation, name: str, results: tuple[Shape, ...]) -> int:
    """Bytes that a fusion writes of its results, of which `name` gives the value."""
    instruction = computation.instructions[name]
    match instruction.opcode:
        case "tuple" if len(instruction.operands) == len(results):
            return sum(
                _written(module, computation, operand, (result,))
                for operand, result in zip(instruction.operands, results, strict=True)
            )
        case "parameter":  # passed on
            return 0
        case "bitcast":
            return _written(module, computation, instruction.operands[0], results)
        case "dynamic-update-slice" | "scatter":
            update = instruction.operands[1 if instruction.opcode == "dynamic-update-slice" else -1]
            return _main(results[0], leaves(computation.instructions[update].shape)[0].bytes)
        case "fusion":
            inner = module.computations[instruction.called("calls")[0]]
            return _written(module, inner, inner.root, results)
    if collectives.kind(instruction) and collectives.repeats(computation, instruction):
        return 0
    return sum(_main(result) for result in results)
