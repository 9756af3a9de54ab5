"""What the summary counts, and the ranks that a structure allows."""

import jax
import jax.numpy as jnp
import pytest

import jaxpeft
from jaxpeft.methods import spec_from_dict

LAYERS, IN, OUT = 6, 64, 96
SITES = jaxpeft.find({"layers": {"up": {"kernel": jnp.ones((LAYERS, IN, OUT))}}}, ".*", layouts={".*": "lio"})
RANK = {"rank": 8}


@pytest.mark.parametrize(
    ("method", "hyper", "expected"),
    [
        ("lora", RANK, 48),
        ("sharelora", {**RANK, "share": "a"}, 48),
        ("sharelora", {**RANK, "share": "b"}, 8),
        ("sharelora", {**RANK, "share": "ab"}, 8),
        ("tiedlora", RANK, 48),
        ("lotr", RANK, 8),
        ("mos", {**RANK, "equivalent_rank": 2, "private_rank": 0, "shards_per_vector": 1}, 12),
        ("mos", {**RANK, "equivalent_rank": 2, "private_rank": 0, "shards_per_vector": 4}, 48),
        ("prolora", {**RANK, "unshared_rank": 2, "sharing_in": 3, "sharing_out": 3}, 48),
        ("surm", {"kind": "circulant", "path": "dense"}, 96),
    ],
)
def test_stacked_column_rank(method, hyper, expected) -> None:
    """Sharing that confines all layers to one space, and sharing that does not."""
    adapter = jaxpeft.init(jax.random.key(0), spec_from_dict({"method": method, **hyper}), SITES)
    (row,) = (row for row in jaxpeft.summary(adapter).rows if row.group is not None)
    assert row.column_rank == expected


def test_bytes_of_pools_are_counted_once_and_of_their_expansion_over_the_layers() -> None:
    spec = spec_from_dict({"method": "mos", "rank": 6, "equivalent_rank": 2, "shards_per_vector": 4})
    (row,) = jaxpeft.summary(jaxpeft.init(jax.random.key(0), spec, SITES)).rows
    pools, tables = 2 * LAYERS * (IN + OUT) * 4, 2 * LAYERS * 6 * 4
    assert row.stored_bytes == pools + tables + LAYERS * 4  # indices below 256, and the scales
    assert row.expanded_bytes == 6 * LAYERS * (IN + OUT) * 4 + LAYERS * 4


def test_what_belongs_to_all_groups_has_a_row_of_its_own() -> None:
    adapter = jaxpeft.init(jax.random.key(0), spec_from_dict({"method": "vera", "rank": 4}), SITES)
    found = jaxpeft.summary(adapter)
    assert [row.name for row in found.rows] == ["layers/up/kernel", "shared"]
    assert found.rows[1].trained == 0
    assert found.rows[1].stored_bytes == 4 * (IN + OUT) * 4
    assert "shared" in str(found)
    # The pair is not repeated for the layers.
    assert found.rows[0].expanded_bytes == (4 * (IN + OUT) + LAYERS * (4 + OUT + 1)) * 4


def test_shapes_alone_will_do() -> None:
    spec = spec_from_dict({"method": "mos", "rank": 6, "equivalent_rank": 2, "shards_per_vector": 4})
    shapes = jax.eval_shape(lambda: jaxpeft.init(jax.random.key(0), spec, SITES))
    (row,) = jaxpeft.summary(shapes).rows
    assert (row.trained, row.column_rank, row.dead) == (2 * LAYERS * (IN + OUT), None, None)
    assert "None" not in str(jaxpeft.summary(shapes)).splitlines()[2]


@pytest.mark.parametrize(
    ("hyper", "bound"),
    [
        ({"method": "mos", "rank": 6, "equivalent_rank": 2}, True),  # its index tables are saved as small integers
        ({"method": "lora", "rank": 2}, False),
        ({"method": "vera", "rank": 4}, False),
        ({"method": "unilora", "rank": 2, "theta_length": 64}, True),
    ],
)
def test_bytes_of_shapes_are_a_bound_where_they_depend_on_values(hyper, bound) -> None:
    adapter = jaxpeft.init(jax.random.key(0), spec_from_dict(hyper), SITES)
    known, shapes = jaxpeft.summary(adapter), jaxpeft.summary(jax.eval_shape(lambda: adapter))
    assert (known.stored_bytes < shapes.stored_bytes) == bound
    assert not any(row.at_most for row in known.rows)
    assert f"; {known.stored_bytes:,} bytes" in str(known)
    said = f"; {'at most ' if bound else ''}{shapes.stored_bytes:,} bytes"
    assert said in str(shapes)
    assert ("≤" in str(shapes)) == bound
