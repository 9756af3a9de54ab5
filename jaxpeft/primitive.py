"""An operation of our own as a primitive of JAX: its gradient is ours, and forward mode stays."""

from collections.abc import Callable
from functools import partial

import jax
import jax.extend.core as jex
from jax.interpreters import batching, mlir


def define(name: str, implementation: Callable, batched: Callable, static: tuple[str, ...]) -> jex.Primitive:
    """A primitive of one result; what it is differentiated to, its module says.

    Args:
        name: in jaxprs.
        implementation: of arrays, and of parameters by keyword, in JAX's own operations.
        batched: ``(primitive, operands, axes, **parameters)`` to the result and its axis under `jax.vmap`.
        static: the parameters' names.
    """
    made = jex.Primitive(name)
    made.def_impl(jax.jit(implementation, static_argnames=static))
    made.def_abstract_eval(lambda *of, **params: jax.make_jaxpr(partial(implementation, **params))(*of).out_avals[0])
    batching.primitive_batchers[made] = partial(batched, made)
    mlir.register_lowering(made, mlir.lower_fun(implementation, multiple_results=False))
    return made
