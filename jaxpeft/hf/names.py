"""Which torch parameter is a weight of a Flax tree, and how does it lie there?"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxpeft.blocks import dequantized
from jaxpeft.layout import sizes, to_matrix
from jaxpeft.sites import Group, flatten, layouts_of

Names = Mapping[str, str] | Callable[[str], str]

_DECODER = re.compile(
    r"embed/embedding|norm/scale|lm_head/kernel|layers/"
    r"(self_attn/([qkvo]_proj|[qk]_norm)|mlp/(gate|up|down)_proj|(input|post_attention)_norm)/(kernel|bias|scale)"
)
_LEAVES = ("kernel", "embedding", "scale", "weight", "bias")
_STACKS = ("layers", "blocks", "layer", "block", "h")


@dataclass(frozen=True)
class Place:
    """Where a torch parameter lies in a tree.

    Attributes:
        path: of the array.
        layer: number of the layer over the array's stack axes.
        layout: of the array.
    """

    path: str
    layer: int
    layout: str


class Modules:
    """Names of torch parameters for the arrays of one tree.

    Args:
        paths: all paths that are named, or the whole tree's; they tell a decoder of `jaxpeft.models` from other trees.
        names: see `jaxpeft.from_peft`.
    """

    def __init__(self, paths: Iterable[str], names: Names | None = None) -> None:
        self.names = names
        self.decoder = all(_DECODER.fullmatch(path) for path in paths)

    def template(self, path: str, stack_axes: int) -> str | None:
        """The torch module of an array, with ``{}`` for each axis that stacks layers; None if there is no default.

        Raises:
            ValueError: a name that was given has not as many ``{}`` as there are such axes.
        """
        given = None
        if self.names is not None:
            given = self.names(path) if callable(self.names) else self.names.get(path)
        if given is not None:
            if given.count("{}") != stack_axes:
                raise ValueError(
                    f"{path} stacks its layers on {stack_axes} axes, but the torch name {given!r} has "
                    f"{given.count('{}')} places '{{}}' for their numbers"
                )
            return given
        if self.decoder and stack_axes == path.startswith("layers/"):
            from jaxpeft.models.names import hf_name  # It brings Flax, which the rest does not need.

            return hf_name(path).rpartition(".")[0]
        default = _default(path, stack_axes)
        return default if default.count("{}") == stack_axes else None

    def parameter(self, path: str, layout: str, shape: Sequence[int], layer: int) -> str:
        """Name of one layer's torch parameter; `layer` counts over the stack axes.

        Raises:
            ValueError: the array has no name.
        """
        stack = sizes(shape, layout, "l")
        template = self.template(path, len(stack))
        if template is None:
            raise ValueError(
                f"where in torch's names do the numbers of the stacked layers of {path} go? Pass names={{path: name}}, "
                f"for example names={{{path!r}: 'model.layers.{{}}.{path.split('/')[-2:][0]}'}}"
            )
        return f"{template.format(*np.unravel_index(layer, stack) if stack else ())}.{leaf_of(path)}"

    def of_group(self, group: Group) -> list[str]:
        """The torch parameters of a group's weights, in the order of its layers."""
        stack = group.sizes("l")
        numbers = np.arange(int(np.prod(stack))).reshape(stack)
        if group.entries is not None:
            numbers = numbers[list(group.entries)]
        return [
            self.parameter(path, group.layout, group.shape, int(n)) for path in group.paths for n in numbers.flatten()
        ]

    def of_tree(self, params: Any, layouts: Mapping[str, str] | None = None) -> dict[str, Place]:
        """{torch parameter: its place} for every array whose axes and name are certain.

        Raises:
            ValueError: two weights would have one name.
        """
        leaves, found = flatten(params), {}
        for path, layout in layouts_of(params, layouts).items():
            stack = sizes(leaves[path].shape, layout, "l")
            if self.template(path, len(stack)) is None:
                continue
            for layer in range(int(np.prod(stack))):
                name = self.parameter(path, layout, leaves[path].shape, layer)
                if name in found:
                    raise ValueError(f"{path} and {found[name].path} would both be torch's {name}; pass names=")
                found[name] = Place(path, layer, layout)
        return found


def leaf_of(path: str) -> str:
    """``bias`` or ``weight``, as torch calls a leaf of a Flax module."""
    return "bias" if path.rpartition("/")[2] == "bias" else "weight"


def _default(path: str, stack_axes: int) -> str:
    """The path without the leaf's own name, layers numbered where the stack's name is.

    >>> _default("model/layers/0/q_proj/kernel", 0), _default("layers/up/kernel", 1)
    ('model.layers.0.q_proj', 'layers.{}.up')
    """
    steps = path.split("/")
    if len(steps) > 1 and steps[-1] in _LEAVES:
        steps = steps[:-1]
    stacks = [at for at, step in enumerate(steps) if step in _STACKS]
    if stack_axes == 1 and stacks:
        steps.insert(stacks[-1] + 1, "{}")
    return ".".join(steps)


def is_embedding(path: str) -> bool:
    """Whether torch's module is an embedding: its weight is (in, out), as Flax's is."""
    return path.rpartition("/")[2] == "embedding"


def is_conv1d(path: str, layout: str) -> bool:
    """Whether torch's module is GPT-2's Conv1D, which keeps (in, out) where Flax's keeps (out, in)."""
    return path.rpartition("/")[2] == "kernel" and layout.replace("l", "") == "oi"


def torch_shaped(matrix: np.ndarray, place: Place) -> np.ndarray:
    """An (in, out) matrix as torch keeps it; a vector is one row."""
    if "i" not in place.layout:
        return matrix.reshape(-1)
    return matrix if is_embedding(place.path) or is_conv1d(place.path, place.layout) else matrix.T


def from_torch(array: np.ndarray, place: Place) -> np.ndarray:
    """The inverse of `torch_shaped`."""
    return torch_shaped(array, place) if "i" in place.layout else array.reshape(1, -1)


def matrix_at(leaves: Mapping[str, Any], place: Place) -> np.ndarray:
    """The weight at a place as a float32 (in, out) matrix; a vector is one row."""
    leaf, layout = dequantized(leaves[place.path]), place.layout
    index = iter(np.unravel_index(place.layer, sizes(leaf.shape, layout, "l")) if "l" in layout else ())
    one = leaf[tuple(next(index) if letter == "l" else slice(None) for letter in layout)]
    return np.asarray(to_matrix(one, layout.replace("l", "")), np.float32)
