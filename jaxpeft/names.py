"""What do Flax's names say of an array: is it a linear kernel, what do its axes mean, are layers stacked in it?"""

from collections.abc import Mapping
from typing import Any

HEADS = ("lm_head", "head", "output_head", "classifier", "score")
"""Module names that `"all-linear"` leaves out: a model's output head is trained whole or not at all."""


def is_head(path: str) -> bool:
    """Whether an array belongs to a model's output head; the paths of an `nnx.State` end in ``/value``."""
    return path.removesuffix("/value").split("/")[-2:-1] in [[name] for name in HEADS]


def is_linear(path: str, shape: tuple[int, ...], stacked: "StackedTrees") -> bool:
    """A kernel of Dense or attention; from four axes on it is a convolution's."""
    kernel = path.rpartition("/")[2] == "kernel"
    return kernel and not is_head(path) and 2 <= len(shape) - stacked.holds(path) <= 3


def layout_by_name(path: str, shape: tuple[int, ...], stacked: "StackedTrees") -> str | None:
    """Layout of a leaf by Flax's names, one letter an axis; None where they do not settle it."""
    lead = "l" if stacked.holds(path) else ""
    module, leaf = (["", *path.split("/")])[-2:]
    axes = len(shape) - len(lead)
    if leaf == "embedding" and axes == 2:
        return lead + "io"
    if leaf == "kernel":
        if axes == 2:
            return lead + "io"
        if axes == 3 and module in ("query", "key", "value"):
            return lead + "ioo"
        if axes == 3 and module == "out":
            return lead + "iio"
    return lead + "o" if axes == 1 else None


class StackedTrees:
    """Tells which leaves lie in a subtree whose every array is stacked over layers on its leading axis."""

    def __init__(self, leaves: Mapping[str, Any]) -> None:
        self.shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
        self.known: dict[str, bool] = {}

    def holds(self, path: str) -> bool:
        """Whether a leaf lies in one."""
        steps = path.split("/")
        return any(self._is_stacked("/".join(steps[:depth])) for depth in range(len(steps) - 1, 0, -1))

    def _is_stacked(self, tree: str) -> bool:
        if tree not in self.known:
            inside = {path: shape for path, shape in self.shapes.items() if path.startswith(f"{tree}/")}
            sizes = {shape[:1] for shape in inside.values()}
            self.known[tree] = len(sizes) == 1 and sizes != {()} and any(map(self._shows_a_stack, inside))
        return self.known[tree]

    def _shows_a_stack(self, path: str) -> bool:
        """A vector of the module's own has two axes: a norm's scale, or the bias of a Dense."""
        module, _, leaf = path.rpartition("/")
        shape = self.shapes[path]
        if leaf == "scale":
            return len(shape) == 2
        kernel = self.shapes.get(f"{module}/kernel", ())
        dense = len(kernel) == 3 and shape == (kernel[0], kernel[2]) and shape != kernel[1:]
        return leaf == "bias" and len(shape) == 2 and dense
