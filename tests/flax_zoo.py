"""Does jaxpeft adapt models that it did not write? Measures those of `foreign` and keeps the table of the answers.

    python tests/flax_zoo.py            # measures all, and fails unless docs/models.md says the same
    python tests/flax_zoo.py --write    # measures all, and writes the table

It needs what tests/flax_zoo.txt lists, in an environment of its own: `make zoo`.
"""

import difflib
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from foreign import MODELS, Foreign
from moved import moved

import jaxpeft
from jaxpeft.methods import lokr, lora, mos
from jaxpeft.spec import Spec

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
PACKAGES = ("jax", "flax", "transformers", "google-tunix", "equinox", "dm-haiku")
METHODS: dict[str, Spec] = {
    "lora": lora.Spec(rank=4),
    "mos": mos.Spec(rank=2, equivalent_rank=2, private_rank=1, shards_per_vector=2),
    "lokr": lokr.Spec(rank=2),
}
STEPS = 15
HEADER = ("model", "parameters", "groups", "weights", "layouts", "find needs", "all fused", "merge = fused", "trains")


@dataclass(frozen=True)
class Measured:
    """What jaxpeft made of one model.

    Attributes:
        sites: what `find` reads off the model.
        by_name: whether `find` without the model gives the same.
        materialized: {method: sites that were formed}.
        merge_error: {method: largest difference of merged and adapted outputs, by the outputs' largest value}.
        moved: {method: the same between adapted and base outputs}.
        losses: {method: loss before and after training}.
        untouched: {method: adapter arrays whose gradient is zero}.
    """

    sites: jaxpeft.Sites
    by_name: bool
    materialized: dict[str, tuple[str, ...]]
    merge_error: dict[str, float]
    moved: dict[str, float]
    losses: dict[str, tuple[float, float]]
    untouched: dict[str, list[str]]

    @property
    def fused(self) -> bool:
        """Whether no weight was formed."""
        return not any(self.materialized.values())

    @property
    def merges(self) -> bool:
        """Whether merged and adapted outputs agree, where the adapter changes them visibly."""
        return max(self.merge_error.values()) < 1e-4 and min(self.moved.values()) > 1e-2

    @property
    def trains(self) -> bool:
        """Whether every loss fell by a tenth or more, and every array of every adapter had a gradient."""
        return all(after < 0.9 * before for before, after in self.losses.values()) and not any(self.untouched.values())


def measure(model: Foreign) -> Measured:
    """Finds, explains, merges and trains."""
    base, apply = model.make()
    sites = jaxpeft.find(base, model=apply)
    made = Measured(sites, _found_by_name(base) == sites, {}, {}, {}, {}, {})
    frozen = jax.jit(apply)(base)
    run_merged = jax.jit(lambda base, adapter: apply(jaxpeft.merge(base, adapter)))
    target = frozen + jnp.sqrt(jnp.mean(frozen**2)) * jax.random.normal(jax.random.key(3), frozen.shape)

    @partial(jax.jit, static_argnums=0)
    def start(spec: Spec) -> tuple[jaxpeft.Adapter, jaxpeft.Adapter]:
        adapter = jaxpeft.init(jax.random.key(0), spec, sites)
        return adapter, moved(adapter, 0.2)

    for name, spec in METHODS.items():
        adapter, changed = start(spec)
        made.materialized[name] = jaxpeft.explain(apply, base, adapter).materialized
        forward = jax.jit(jaxpeft.adapt(apply))
        outputs = forward(base, changed)
        made.merge_error[name] = _apart(outputs, run_merged(base, changed))
        made.moved[name] = _apart(outputs, frozen)
        made.losses[name], made.untouched[name] = _train(apply, base, adapter, target)
    return made


def _found_by_name(base: Any) -> jaxpeft.Sites | None:
    try:
        return jaxpeft.find(base)
    except ValueError:
        return None


def _apart(a: jax.Array, b: jax.Array) -> float:
    return float(jnp.abs(a - b).max() / jnp.abs(b).max())


def _train(
    apply: Callable[[Any], jax.Array], base: Any, adapter: jaxpeft.Adapter, target: jax.Array
) -> tuple[tuple[float, float], list[str]]:
    """The loss before and after some steps of Adam, and the arrays that had a zero gradient after them."""
    forward, optimizer = jaxpeft.adapt(apply), optax.adam(1e-2)

    @jax.jit
    def step(params: Any, state: Any, base: Any) -> tuple[Any, Any, jax.Array, Any]:
        def loss(params: Any) -> jax.Array:
            return jnp.mean((forward(base, adapter.replace(params=params)) - target) ** 2) / jnp.mean(target**2)

        value, gradients = jax.value_and_grad(loss)(params)
        changes, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, changes), state, value, jax.tree.map(jnp.any, gradients)

    params, state = adapter.params, jax.jit(optimizer.init)(adapter.params)
    losses = []
    for _ in range(STEPS + 1):
        params, state, value, moves = step(params, state, base)
        losses.append(float(value))
    zero = [
        jax.tree_util.keystr(path) for path, any_of_it in jax.tree_util.tree_leaves_with_path(moves) if not any_of_it
    ]
    return (losses[0], losses[-1]), zero


def row(name: str, model: Foreign, made: Measured) -> str:
    """One line of the table."""
    layouts = ", ".join(f"`{layout}`" for layout in sorted({group.layout for group in made.sites}))
    weights = sum(group.layers for group in made.sites)
    answers = ["yes" if answer else "**no**" for answer in (made.fused, made.merges, made.trains)]
    needs = "names" if made.by_name else "`model=`"
    cells = [name, model.kind, str(len(made.sites)), str(weights), layouts, needs, *answers]
    return f"| {' | '.join(cells)} |"


def table(rows: Sequence[str]) -> str:
    """The table, with the versions that it was measured with."""
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    header = [f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}"]
    return "\n".join([f"`make zoo`; {versions}.", "", *header, *rows, ""])


def main() -> int:
    """Measures all models; 1 if the page says otherwise."""
    rows = []
    for name, model in MODELS.items():
        with warnings.catch_warnings():  # Other libraries' own affairs; what jaxpeft warns of is an error.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", jaxpeft.MaterializeWarning)
            made = measure(model)
        rows.append(row(name, model, made))
        falls = ", ".join(f"{method} {before:.2f} to {after:.2f}" for method, (before, after) in made.losses.items())
        print(f"{name}: merged to {max(made.merge_error.values()):.0e}; loss: {falls}", flush=True)
        problems = {"formed": made.materialized, "no gradient": made.untouched}
        print("".join(f"  {what}: {where}\n" for what, where in problems.items() if any(where.values())), end="")
    page = PAGE.read_text(encoding="utf-8")
    before, (old, after) = page.split(BEGIN)[0], page.split(BEGIN)[1].split(END)
    new = table(rows)
    if "--write" in sys.argv[1:]:
        PAGE.write_text(f"{before}{BEGIN}{new}{END}{after}", encoding="utf-8")
        return 0
    sys.stdout.writelines(
        difflib.unified_diff(old.splitlines(True), new.splitlines(True), "docs/models.md", "measured")
    )
    return int(old != new)


if __name__ == "__main__":
    sys.exit(main())
