"""How many floating-point operations does a matrix product or a convolution of a compiled program take?"""

import functools
import math
import re

from train.hlo import Computation, Instruction, Shape, integers, leaves

_CUSTOM = re.compile(r'custom_call_target="__(?:cublas\$|onednn\$matmul)')


def flops(computation: Computation, instruction: Instruction) -> float:
    """2·M·N·K of a `dot` or a GPU library's call, the same of a `convolution`; 0 for everything else."""
    match instruction.opcode:
        case "dot" | "scaled-dot" | "ragged-dot":
            contracted = integers(instruction.attribute("lhs_contracting_dims"))
        case "convolution":
            return _convolution(computation, instruction)
        case "custom-call" if _CUSTOM.search(instruction.attributes):
            found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
            contracted = integers(found[1]) if found else (-1,)
        case _:
            return 0.0
    left = _operand(computation, instruction, 0)
    # A library's call also returns its workspace.
    result = leaves(instruction.shape)[0]
    return 2.0 * result.size * math.prod(left.dims[dim] for dim in contracted)


def _operand(computation: Computation, instruction: Instruction, number: int) -> Shape:
    return leaves(computation.instructions[instruction.operands[number]].shape)[0]


def _convolution(computation: Computation, instruction: Instruction) -> float:
    """Multiplications of positions that exist, not of padding: a TPU's batched products are such convolutions."""
    labels = re.match(r"([\w?]+)_([\w?]+)->([\w?]+)", instruction.attribute("dim_labels") or "")
    if labels is None:
        raise ValueError(f"the convolution {instruction.name!r} has no dim_labels: {instruction.attributes[:80]!r}")
    left, right = _operand(computation, instruction, 0), _operand(computation, instruction, 1)
    result = leaves(instruction.shape)[0]
    sizes = [
        dict(zip(label, shape.dims, strict=True))
        for label, shape in zip(labels.groups(), (left, right, result), strict=True)
    ]
    window = _window(instruction.attribute("window") or "", sum(label.isdigit() for label in labels[1]))
    met = math.prod(
        positions(sizes[0][str(dim)], sizes[1][str(dim)], sizes[2][str(dim)], *options)
        for dim, options in enumerate(window)
    )
    features = sizes[0]["f"] // int(instruction.attribute("feature_group_count") or 1)
    batch = sizes[0]["b"] // int(instruction.attribute("batch_group_count") or 1)
    return 2.0 * batch * features * sizes[2]["f"] * met


def _window(text: str, dims: int) -> list[tuple[int, int, int, int]]:
    """Stride, padding in front, dilation of the input and of the kernel along each spatial dimension."""
    parts = dict(word.split("=") for word in text.split())

    def along(name: str, default: str) -> list[int]:
        words = parts[name].split("x") if name in parts else [default] * dims
        return [int(word.split("_")[0]) for word in words]

    return list(
        zip(along("stride", "1"), along("pad", "0_0"), along("lhs_dilate", "1"), along("rhs_dilate", "1"), strict=True)
    )


@functools.lru_cache
def positions(size: int, kernel: int, result: int, stride: int, pad: int, dilation: int, kernel_dilation: int) -> int:
    """Pairs of output and kernel positions along one dimension that meet an element of the input.

    Position o of the output and k of the kernel meet at o·stride + k·kernel_dilation - pad, which has to be one of the
    input's, every dilation-th.

    Examples:
      >>> positions(32, 32, 32, 31, 0, 32, 1)  # how a product batched over 32 heads is written
      32
    """
    if kernel > result:  # The fewer of the two are tried one by one; the formula is symmetric in them.
        return positions(size, result, kernel, kernel_dilation, pad, dilation, stride)
    count = 0
    for offset in (k * kernel_dilation - pad for k in range(kernel)):
        # o·stride + offset ≡ 0 modulo the dilation holds for every period-th o, from `first`.
        common = math.gcd(stride, dilation)
        if offset % common:
            continue
        period = dilation // common
        first = (-offset // common * pow(stride // common, -1, period)) % period if period > 1 else 0
        low = max(0, -(offset // stride))
        high = min(result - 1, ((size - 1) * dilation - offset) // stride)
        if high >= low:
            count += (high - first) // period - (low - 1 - first) // period
    return count
