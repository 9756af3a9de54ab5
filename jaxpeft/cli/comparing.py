"""How far apart are two adapters? Measured on their updates, so across methods."""

import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpeft.adapter import Adapter, by_path, check_base
from jaxpeft.cli import sources
from jaxpeft.convert import at, check_same, dense, places
from jaxpeft.layout import to_matrix
from jaxpeft.sites import flatten
from jaxpeft.table import table


def diff(a: str, b: str, *, tolerance: float = 1e-6, model: str | None = None) -> tuple[dict[str, Any], str]:
    """Compares two adapters.

    Args:
        a: path of the first.
        b: path of the second.
        tolerance: most ‖ΔA - ΔB‖ / ‖ΔA‖ of a group where they count as the same.
        model: the base, for updates that depend on the weight they change.

    Returns:
        ``{"same", "tolerance", "groups", "only_in_a", "only_in_b", "spec", "base"}``, and the same as text. They are
        the same if they change the same weights and no group is beyond the tolerance; specs may differ.
    """
    params = sources.params(model)
    pair = sources.adapter(a, params), sources.adapter(b, params)
    rows = list(groups(*pair, params))
    only = [_missing(one, other) for one, other in (pair, pair[::-1])]
    specs = [adapter.spec.to_dict() for adapter in pair]
    spec = {
        name: [spec.get(name) for spec in specs]
        for name in {**specs[0], **specs[1]}
        if specs[0].get(name) != specs[1].get(name)
    }
    base = [sources.fingerprint(path) for path in (a, b)]
    within = all(row["relative"] is not None and row["relative"] <= tolerance for row in rows)
    found = {
        "same": within and not any(only),
        "tolerance": tolerance,
        "groups": rows,
        "only_in_a": only[0],
        "only_in_b": only[1],
        "spec": spec,
        "base": base,
    }
    return found, _text(found)


def groups(a: Adapter, b: Adapter, params: Any = None) -> Iterator[dict[str, Any]]:
    """One row for every group of `a`, over the weights that both adapters change.

    Yields:
        ``name``, ``weights`` (how many are compared), ``norm_a``, ``norm_b``; ``relative``, ‖ΔA - ΔB‖ / ‖ΔA‖, 0 if both
        are zero and None if ΔA alone is; ``cosine`` of ΔA and ΔB, None if one is zero. Norms are over the whole group.
    """
    leaves = None if params is None else flatten(params)
    if leaves is not None:
        check_base(a.sites, leaves)
        check_base(b.sites, leaves)
    updates_a, updates_b = by_path(a), by_path(b)
    for group in a.sites:
        weights, sums = 0, np.zeros(4)
        for path in group.paths:
            if path not in updates_b:
                continue
            other = updates_b[path][0]
            check_same(path, group, other)
            stack = None if leaves is None else to_matrix(leaves[path], group.layout).astype(jnp.float32)
            for index in sorted(set(places(group)) & set(places(other))):
                weight = None if stack is None else stack[index]
                deltas = [dense(at(found[path][1], index), weight) for found in (updates_a, updates_b)]
                x, y = (delta.astype(np.float64).ravel() for delta in deltas)
                sums += [x @ x, y @ y, x @ y, np.sum(np.square(x - y))]
                weights += 1
        if weights:
            norm_a, norm_b, apart = (math.sqrt(sums[i]) for i in (0, 1, 3))
            yield {
                "name": group.name,
                "weights": weights,
                "norm_a": norm_a,
                "norm_b": norm_b,
                "relative": apart / norm_a if norm_a else (None if apart else 0.0),
                "cosine": float(sums[2] / (norm_a * norm_b)) if norm_a and norm_b else None,
            }


def _missing(one: Adapter, other: Adapter) -> dict[str, int]:
    """{group of the first: how many of its weights the second does not change}."""
    changed = {(path, index) for group in other.sites for path in group.paths for index in places(group)}
    counts = {
        group.name: sum((path, index) not in changed for path in group.paths for index in places(group))
        for group in one.sites
    }
    return {name: count for name, count in counts.items() if count}


def _text(found: dict[str, Any]) -> str:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines: list[tuple[str, ...]] = [("group", "weights", "‖ΔA‖", "‖ΔB‖", "‖ΔA-ΔB‖/‖ΔA‖", "cosine")]
    for row in found["groups"]:
        norms = (number(row[name], ".4g") for name in ("norm_a", "norm_b"))
        apart = number(row["relative"], ".3e")
        lines.append((row["name"], str(row["weights"]), *norms, apart, number(row["cosine"], ".6f")))
    text = table(lines)
    for name in ("a", "b"):
        text += [
            f"only in {name.upper()}: {group} ({count} weights)" for group, count in found[f"only_in_{name}"].items()
        ]
    text += [f"spec {name}: {a!r} in A, {b!r} in B" for name, (a, b) in found["spec"].items() if None not in (a, b)]
    if None not in found["base"] and found["base"][0] != found["base"][1]:
        text.append(f"base: {found['base'][0]} in A, {found['base'][1]} in B")
    text.append(f"{'same' if found['same'] else 'different'} within {found['tolerance']:g}")
    return "\n".join(text)
