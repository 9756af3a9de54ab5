"""Evaluates a jaxpr in which some inputs are adapted weights.

An equation that touches none is bound as it stands. One that does is computed by its rule; without a rule the weight
is formed, which is always correct, and noted. Control flow is rebuilt around the interpreted bodies, so that a weight
keeps its factors inside scan, remat, while, cond and jit.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import Array
from jax.extend.core import primitives

from jaxpeft import rules, views
from jaxpeft.values import Adapted, by_layer, record


def evaluate(jaxpr: jex.ClosedJaxpr, inputs: Sequence[Any], needed: Sequence[bool] | None = None) -> list[Array]:
    """The needed outputs of a jaxpr, all by default, as plain arrays."""
    needed = [True] * len(jaxpr.jaxpr.outvars) if needed is None else needed
    outputs = interpret(jaxpr, inputs, needed)
    return [_form(value, "output") for value, wanted in zip(outputs, needed, strict=True) if wanted]


def interpret(jaxpr: jex.ClosedJaxpr, inputs: Sequence[Any], needed: Sequence[bool]) -> list[Any]:
    """The outputs of a jaxpr, None where not needed; weights that it only passes on come out adapted."""
    environment: dict[Any, Any] = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
    environment |= zip(jaxpr.jaxpr.invars, inputs, strict=True)
    formed: dict[Any, Array] = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else environment[atom]

    def read_formed(atom: Any, primitive: str) -> Any:
        value = read(atom)
        if not isinstance(value, Adapted):
            return value
        record(value, primitive, fused=value.formed)
        if atom not in formed:  # Consumers of one weight share one W'.
            formed[atom] = value.materialize()
        return formed[atom]

    for equation, wanted in live_equations(jaxpr.jaxpr, needed):
        primitive, results = equation.primitive, NotImplemented
        operands = [read(atom) for atom in equation.invars]
        with equation.ctx.manager, jax.named_scope(str(equation.source_info.name_stack)):
            if any(isinstance(operand, Adapted) for operand in operands):
                if primitive in CONTROL_FLOW:
                    results = CONTROL_FLOW[primitive](equation.params, wanted, operands)
                elif rule := rules.rule_of(primitive):
                    results = rule(equation.params, *operands)
                if results is NotImplemented:
                    operands = [read_formed(atom, primitive.name) for atom in equation.invars]
            if results is NotImplemented:
                results = primitive.bind(*operands, **primitive.get_bind_params(equation.params))
        environment |= zip(equation.outvars, results if primitive.multiple_results else [results], strict=True)
    return [read(atom) if wanted else None for atom, wanted in zip(jaxpr.jaxpr.outvars, needed, strict=True)]


def live_equations(jaxpr: jex.Jaxpr, needed: Sequence[bool]) -> list[tuple[jex.JaxprEqn, list[bool]]]:
    """The equations that the needed outputs depend on, or that have effects, each with the outputs needed of it.

    Dead code matters here: nnx.scan hands every weight back from its loop, and a weight must not be formed for that.
    """
    live = {atom for atom, wanted in zip(jaxpr.outvars, needed, strict=True) if wanted and isinstance(atom, jex.Var)}
    kept = []
    for equation in reversed(jaxpr.eqns):
        wanted = [variable in live for variable in equation.outvars]
        if any(wanted) or equation.effects:
            live |= {atom for atom in equation.invars if isinstance(atom, jex.Var)}
            kept.append((equation, wanted))
    return kept[::-1]


def _form(value: Any, primitive: str) -> Any:
    if not isinstance(value, Adapted):
        return value
    record(value, primitive, fused=value.formed)
    return value.materialize()


def _jit(params: dict, needed: Sequence[bool], operands: Sequence[Any]) -> list[Any]:
    return interpret(params["jaxpr"], operands, needed)


def _remat(params: dict, needed: Sequence[bool], operands: Sequence[Any]) -> list[Any]:
    body = jex.ClosedJaxpr(params["jaxpr"], ())
    passed_on = _passed_on(params["jaxpr"], operands)
    computed = [wanted and at not in passed_on for at, wanted in enumerate(needed)]

    def recomputed(operands: Sequence[Any]) -> list[Array]:
        return evaluate(body, operands, computed)

    results = jax.checkpoint(recomputed, policy=params["policy"], prevent_cse=params["prevent_cse"])(operands)
    return _filled(results, computed, passed_on)


def _scan(params: dict, needed: Sequence[bool], operands: Sequence[Any]) -> Any:
    consts, carry, xs = scan_groups(params, operands)
    leading = [views.stack_axis_first(x) if isinstance(x, Adapted) else x for x in xs]
    if any(x is NotImplemented for x in leading):
        return NotImplemented
    # A stacked weight that the body hands back slice by slice is that weight again.
    passed_on = _passed_on(params["jaxpr"].jaxpr, [*[None] * (len(consts) + len(carry)), *xs])
    computed = [at < len(carry) or (wanted and at not in passed_on) for at, wanted in enumerate(needed)]

    # What serves all layers is no input of the loop.
    leaves, axes, join = by_layer(leading, params["length"])
    stacked = [None if axis is None else leaf for leaf, axis in zip(leaves, axes, strict=True)]

    def body(carry: list, xs: list) -> tuple[list, list]:
        whole = join([leaf if x is None else x for leaf, x in zip(leaves, xs, strict=True)])
        slices = [views.without_leading_axis(x) if isinstance(x, Adapted) else x for x in whole]
        outputs = evaluate(params["jaxpr"], [*consts, *carry, *slices], computed)
        return outputs[: len(carry)], outputs[len(carry) :]

    carry, ys = jax.lax.scan(
        body,
        [_form(value, "scan carry") for value in carry],
        stacked,
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
        _split_transpose=params.get("_split_transpose", False),
    )
    return _filled([*carry, *ys], computed, passed_on)


def _passed_on(jaxpr: jex.Jaxpr, operands: Sequence[Any]) -> dict[int, Adapted]:
    """{output: operand} of adapted weights that a body returns as it got them."""
    inputs = dict(zip(jaxpr.invars, operands, strict=True))
    found = {at: inputs.get(atom) for at, atom in enumerate(jaxpr.outvars) if isinstance(atom, jex.Var)}
    return {at: value for at, value in found.items() if isinstance(value, Adapted)}


def _filled(results: Sequence[Any], computed: Sequence[bool], passed_on: Mapping[int, Any]) -> list[Any]:
    """Outputs in their places: computed, passed on, or None where not needed."""
    remaining = iter(results)
    return [next(remaining) if made else passed_on.get(at) for at, made in enumerate(computed)]


def scan_groups(params: dict, operands: Sequence[Any]) -> tuple[list, list, list]:
    """Operands of a scan as constants, carry and stacked inputs."""
    if "ft_in" in params:  # jax >= 0.11
        consts, carry, xs = (list(group.vals) for group in params["ft_in"].update(operands).unpack())
        return consts, carry, xs
    first, second = params["num_consts"], params["num_consts"] + params["num_carry"]
    return list(operands[:first]), list(operands[first:second]), list(operands[second:])


def _while(params: dict, needed: Sequence[bool], operands: Sequence[Any]) -> list[Array]:
    del needed  # The loop needs its whole carry.
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    condition_consts, body_consts, carry = operands[:first], operands[first:second], operands[second:]
    return jax.lax.while_loop(
        lambda carry: evaluate(params["cond_jaxpr"], [*condition_consts, *carry])[0],
        lambda carry: evaluate(params["body_jaxpr"], [*body_consts, *carry]),
        [_form(value, "while carry") for value in carry],
    )


def _cond(params: dict, needed: Sequence[bool], operands: Sequence[Any]) -> list[Any]:
    def branch(jaxpr: jex.ClosedJaxpr) -> Callable[..., list[Array]]:
        return lambda *operands: evaluate(jaxpr, operands, needed)

    index, *operands = operands
    branches = [branch(jaxpr) for jaxpr in params["branches"]]
    if platforms := params.get("branches_platforms"):  # Then a branch may not even compile for another platform.
        by_platform = {
            name: at for names, at in zip(platforms, branches, strict=True) for name in names or ("default",)
        }
        results = jax.lax.platform_dependent(*operands, **by_platform)
    else:
        results = jax.lax.switch(jnp.asarray(index, jnp.int32), branches, *operands)
    return _filled(results, needed, {})


CONTROL_FLOW: dict[jex.Primitive, Callable[[dict, Sequence[bool], Sequence[Any]], Any]] = {
    primitives.jit_p: _jit,
    primitives.remat_p: _remat,
    primitives.scan_p: _scan,
    primitives.while_p: _while,
    primitives.cond_p: _cond,
}
"""{primitive: rule}; a rule takes the equation's parameters, which outputs are needed, and the operands."""
