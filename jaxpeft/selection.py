"""Which leaves of a tree does a selection name, and what is to be said if it names none?"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Selection = str | Sequence[str] | Callable[[str, Any], bool]

ALL_LINEAR = "all-linear"


def select(
    leaves: Mapping[str, Any],
    selection: Selection,
    argument: str,
    linear: Callable[[str], bool],
    shown: bool,
) -> list[str]:
    """Paths that one selection matches; an error if there are none. `shown`: a model says which ones are linear."""
    if isinstance(selection, str):
        if selection == ALL_LINEAR:
            chosen = [path for path in leaves if linear(path)]
        else:
            pattern = compile_pattern(selection, argument)
            chosen = [path for path in leaves if pattern.fullmatch(path)]
    elif callable(selection):
        chosen = [path for path, leaf in leaves.items() if selection(path, leaf)]
    else:
        names = [name for name in selection if name != ALL_LINEAR]
        if unmatched := [name for name in names if not any(_ends_with(path, name) for path in leaves)]:
            near = "; ".join(f"{name!r}: {nearest_paths(name, leaves)}" for name in unmatched)
            raise ValueError(f"{argument} names that match nothing: {near}{_of_a_state(leaves)}")
        also_linear = ALL_LINEAR in selection
        chosen = [p for p in leaves if any(_ends_with(p, name) for name in names) or (also_linear and linear(p))]
    if not chosen:
        what = selection if isinstance(selection, str) else getattr(selection, "__name__", selection)
        remedy = _remedy(leaves, selection, argument, shown) if leaves else ""
        raise ValueError(
            f"{argument}={what!r} matches none of {len(leaves)} arrays; {nearest_paths(str(what), leaves)}{remedy}"
        )
    return chosen


def _remedy(leaves: Mapping[str, Any], selection: Selection, argument: str, shown: bool) -> str:
    """What to do about a selection that matches nothing, to be put behind the nearest paths."""
    if isinstance(selection, str) and selection != ALL_LINEAR:
        if difflib.SequenceMatcher(None, selection.lower(), ALL_LINEAR).ratio() > 0.8:
            return f"; did you mean {ALL_LINEAR!r}?"
        if any(_ends_with(path, selection) for path in leaves):
            listed = f"{argument}={[selection]!r}"
            return f"; a string is a regular expression of the whole path, names are given as a list: {listed}"
    elif not callable(selection) and shown:
        return "; no product of the model is with one of them"
    if state := _of_a_state(leaves):
        return state
    if not callable(selection) and ALL_LINEAR in selection:
        return (
            f"; {ALL_LINEAR!r} takes the kernels of linear layers by Flax's names; for other names pass model=lambda "
            "params: apply(params, inputs), which shows them, or select them by a regular expression, with layouts= "
            "where their axes are not certain"
        )
    return ""


def _of_a_state(leaves: Mapping[str, Any]) -> str:
    """What to do about the paths of an `nnx.State`, or of a module, which end in a step that is no name of Flax's."""
    if not leaves or not all(path.endswith("/value") for path in leaves):
        return ""
    return (
        "; in an nnx.State or an nnx.Module every path ends in /value: pass nnx.to_pure_dict(state), or leave the "
        "choice to the model, find(state, model=lambda state: nnx.merge(graph, state)(inputs))"
    )


def _ends_with(path: str, name: str) -> bool:
    """Whether `name` is the path, or the end of it, or the end of it without the leaf's own name."""
    module, _, leaf = path.rpartition("/")
    weight = leaf in ("kernel", "embedding", "weight", "w")
    return f"/{path}".endswith(f"/{name}") or (weight and f"/{module}".endswith(f"/{name}"))


def compile_pattern(pattern: str, argument: str) -> re.Pattern[str]:
    """A regular expression; a ValueError names the argument that is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{argument}={pattern!r} is not a regular expression: {error}") from None


def nearest_paths(wanted: str, paths: Iterable[str]) -> str:
    """The paths that look most like `wanted`, layers folded together, for an error message."""
    names = list(dict.fromkeys(module_type(path)[0] for path in paths))
    plain = re.sub(r"[\\^$()|?+\[\]]|\.\*", " ", wanted).replace(".", "/")
    words = [word for word in re.split(r"[^A-Za-z0-9_]+", plain) if len(word) > 1]

    def likeness(name: str) -> float:
        hits = sum(
            max((difflib.SequenceMatcher(None, w, s).ratio() for s in name.split("/")), default=0) for w in words
        )
        return hits + difflib.SequenceMatcher(None, plain, name).ratio()

    best = sorted(names, key=likeness, reverse=True)[:5]
    return f"nearest: {', '.join(best)}" if best else "the tree holds no arrays"


def module_type(path: str) -> tuple[str, int | None]:
    """A path with its layer's number as ``*``, and that number.

    The layer is the outermost numbered step: a list index, or a name such as ``block_3``. The module that holds the
    leaf itself counts only as a list index: ``Dense_0`` and ``Dense_1`` of one block are two module types.
    """
    steps = path.split("/")
    for at, step in enumerate(steps[:-1]):
        if step.isdigit():
            return "/".join([*steps[:at], "*", *steps[at + 1 :]]), int(step)
        numbered = re.fullmatch(r"(.+_)(\d+)", step)
        if numbered and at < len(steps) - 2:
            return "/".join([*steps[:at], f"{numbered[1]}*", *steps[at + 1 :]]), int(numbered[2])
    return path, None
