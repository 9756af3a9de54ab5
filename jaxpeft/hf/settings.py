"""Which fields of a PEFT config say what an adapter is, and which modules it adapts?"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpeft.adapter import Adapter
from jaxpeft.hf import native
from jaxpeft.hf.names import Modules
from jaxpeft.sites import Group
from jaxpeft.spec import alpha_of
from jaxpeft.updates import Decomposed, LowRank, Update


def factors_of(update: Update) -> LowRank | None:
    """The factors of a LoRA or a DoRA, with positive scales; None if the update is neither."""
    inner = update.update if isinstance(update, Decomposed) else update
    factors = inner.factors() if inner.additive and not inner.on_output else None
    if factors is None or (factors.scale > 0).all():
        return factors
    return LowRank(factors.a, factors.b * factors.scale[:, None, None], jnp.ones_like(factors.scale))


def fields(
    adapter: Adapter, adapted: Sequence[Group], method: native.Format, modules: Modules
) -> dict[str, Any] | None:
    """The method's fields, with patterns for what varies over modules; None if PEFT has no pattern for it."""
    each = _each_module(adapter, adapted, method, modules)
    if each is None:
        return None
    said: dict[str, Any] = dict(method.fixed)
    for field in dict.fromkeys(field for own in each.values() for field in own):
        values = {name: own.get(field, method.defaults.get(field)) for name, own in each.items()}
        listing = next((key for key, of in method.listed.items() if of == field), None)
        if listing:
            said[listing] = [name for name, value in values.items() if value]
            continue
        ((said[field], _),) = Counter(values.values()).most_common(1)
        others = {name: value for name, value in values.items() if value != said[field]}
        if others:
            key = next((key for key, of in method.patterns.items() if of == field), None)
            if key is None:
                return None
            said[key] = _pattern(others, list(each))
    return said


def _each_module(
    adapter: Adapter, adapted: Sequence[Group], method: native.Format, modules: Modules
) -> dict[str, dict[str, Any]] | None:
    """{module: its fields}, alpha so that the scale is the adapter's own."""
    each: dict[str, dict[str, Any]] = {}
    updates = adapter.updates() if method is native.LORA else {}
    rslora = all(adapter.spec.part(group).rslora for group in adapted)
    dora = any(isinstance(update, Decomposed) for update in updates.values())
    for group in adapted:
        part = adapter.spec.part(group)
        if method is native.LORA:
            factors = factors_of(updates[group.name])
            assert factors is not None
            rank, scales = factors.a.shape[1], np.asarray(factors.scale)
            own: dict[str, Any] | None = {"r": rank, "use_rslora": rslora, "use_dora": dora}
            divisor = float(np.sqrt(rank)) if rslora else rank
        else:
            own, scales = method.config(part), np.asarray(adapter.constants[group.name]["scale"])
            divisor = getattr(part, "rank", 1)
        if own is None:
            return None
        if method.dropout and part.dropout and (part.dropout_on, part.dropout_pattern) == ("input", "element"):
            own[method.dropout] = part.dropout
        names = modules.of_group(group)
        for name, scale in zip(names, np.broadcast_to(scales, len(names)), strict=True):
            alpha = {method.alpha: alpha_of(float(scale), divisor)} if method.alpha else {}
            each[name.rpartition(".")[0]] = own | alpha
    return each


def _pattern(values: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """{module: value} by the ends of names where an end stands for exactly the modules of one value."""
    pattern = {}
    for name, value in values.items():
        if any(re.match(rf"(.*\.)?({key})$", name) for key in pattern):
            continue
        same = {other for other, its in values.items() if its == value}
        steps = name.split(".")
        for at in range(len(steps) - 1, -1, -1):
            key = ".".join(steps[at:])
            if {other for other in modules if re.match(rf"(.*\.)?({key})$", other)} <= same:
                pattern[key] = value
                break
    return pattern


def short(targets: Sequence[str], known: Sequence[str]) -> list[str]:
    """The shortest ends of names that stand for the targets and no other known module; whole names if none is known."""
    if not known:
        return list(targets)
    wanted, found = set(targets), []
    for name in targets:
        if any(name == end or name.endswith(f".{end}") for end in found):
            continue
        steps = name.split(".")
        ends = [".".join(steps[at:]) for at in range(len(steps) - 1, -1, -1)]
        meant = [{other for other in known if other == end or other.endswith(f".{end}")} for end in ends]
        found.append(next((end for end, those in zip(ends, meant, strict=True) if those <= wanted), name))
    return found
