"""Evaluates a jaxpr in which some inputs are adapted weights.

An equation that touches none is bound as it stands. One that does is computed by its rule; without a rule the weight
is formed, which is always correct, and noted. Control flow is rebuilt around the interpreted bodies, so that a weight
keeps its factors inside scan, remat, while, cond and jit.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
from jax import Array
from jax.extend.core import primitives

from jaxpeft import rules
from jaxpeft.values import Adapted, record


def evaluate(jaxpr: jex.ClosedJaxpr, inputs: Sequence[Any]) -> list[Array]:
    """The outputs of a jaxpr, as plain arrays."""
    return [_form(value, "output") for value in interpret(jaxpr, inputs)]


def interpret(jaxpr: jex.ClosedJaxpr, inputs: Sequence[Any]) -> list[Any]:
    """The outputs of a jaxpr; weights that it only passes on come out adapted."""
    environment: dict[Any, Any] = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
    environment |= zip(jaxpr.jaxpr.invars, inputs, strict=True)
    formed: dict[Any, Array] = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else environment[atom]

    def read_formed(atom: Any, primitive: str) -> Any:
        value = read(atom)
        if not isinstance(value, Adapted):
            return value
        record(value, primitive, fused=False)
        if atom not in formed:  # Consumers of one weight share one W'.
            formed[atom] = value.materialize()
        return formed[atom]

    for equation in jaxpr.jaxpr.eqns:
        primitive, results = equation.primitive, NotImplemented
        operands = [read(atom) for atom in equation.invars]
        with equation.ctx.manager, jax.named_scope(str(equation.source_info.name_stack)):
            if any(isinstance(operand, Adapted) for operand in operands):
                if primitive in RULES:
                    results = RULES[primitive](equation.params, *operands)
                if results is NotImplemented:
                    operands = [read_formed(atom, primitive.name) for atom in equation.invars]
            if results is NotImplemented:
                results = primitive.bind(*operands, **primitive.get_bind_params(equation.params))
        environment |= zip(equation.outvars, results if primitive.multiple_results else [results], strict=True)
    return [read(atom) for atom in jaxpr.jaxpr.outvars]


def _form(value: Any, primitive: str) -> Any:
    if not isinstance(value, Adapted):
        return value
    record(value, primitive, fused=False)
    return value.materialize()


def _jit(params: dict, *operands: Any) -> list[Any]:
    return interpret(params["jaxpr"], operands)


def _remat(params: dict, *operands: Any) -> list[Array]:
    body = jex.ClosedJaxpr(params["jaxpr"], ())

    def recomputed(operands: Sequence[Any]) -> list[Array]:
        return evaluate(body, operands)

    return jax.checkpoint(recomputed, policy=params["policy"], prevent_cse=params["prevent_cse"])(operands)


def _scan(params: dict, *operands: Any) -> Any:
    consts, carry, xs = _scan_groups(params, operands)
    leading = [rules.stack_axis_first(x) if isinstance(x, Adapted) else x for x in xs]
    if any(x is NotImplemented for x in leading):
        return NotImplemented

    def body(carry: list, xs: list) -> tuple[list, list]:
        slices = [rules.without_leading_axis(x) if isinstance(x, Adapted) else x for x in xs]
        outputs = evaluate(params["jaxpr"], [*consts, *carry, *slices])
        return outputs[: len(carry)], outputs[len(carry) :]

    carry, ys = jax.lax.scan(
        body,
        [_form(value, "scan carry") for value in carry],
        leading,
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
        _split_transpose=params.get("_split_transpose", False),
    )
    return [*carry, *ys]


def _scan_groups(params: dict, operands: Sequence[Any]) -> tuple[list, list, list]:
    """Operands of a scan as constants, carry and stacked inputs."""
    if "ft_in" in params:  # jax >= 0.11
        consts, carry, xs = (list(group.vals) for group in params["ft_in"].update(operands).unpack())
        return consts, carry, xs
    first, second = params["num_consts"], params["num_consts"] + params["num_carry"]
    return list(operands[:first]), list(operands[first:second]), list(operands[second:])


def _while(params: dict, *operands: Any) -> list[Array]:
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    condition_consts, body_consts, carry = operands[:first], operands[first:second], operands[second:]
    return jax.lax.while_loop(
        lambda carry: evaluate(params["cond_jaxpr"], [*condition_consts, *carry])[0],
        lambda carry: evaluate(params["body_jaxpr"], [*body_consts, *carry]),
        [_form(value, "while carry") for value in carry],
    )


def _cond(params: dict, index: Any, *operands: Any) -> list[Array]:
    branches: list[Callable] = [
        lambda *operands, branch=branch: evaluate(branch, operands) for branch in params["branches"]
    ]
    return jax.lax.switch(jax.numpy.asarray(index, "int32"), branches, *operands)


RULES: dict[jex.Primitive, Callable[..., Any]] = {
    primitives.jit_p: _jit,
    primitives.remat_p: _remat,
    primitives.scan_p: _scan,
    primitives.while_p: _while,
    primitives.cond_p: _cond,
    **rules.RULES,
}
"""{primitive: rule}; a rule takes the equation's parameters and operands and returns the results, or NotImplemented."""
