"""Costs of compiled programs, against figures worked out by hand: on CPU, and forms that only TPUs and GPUs have."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from train import collectives, costs, hlo, matrices
from train.hlo import Shape

LAYERS, BATCH, WIDTH, HIDDEN = 5, 4, 8, 16


def shape(*dims: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def analysed(function, *args) -> costs.Costs:
    return costs.analyse(jax.jit(function).lower(*args).compile().as_text())


def block(x: jax.Array, weights: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    return jnp.tanh(jnp.tanh(x @ weights[0]) @ weights[1]), None


def stack(body, weights, x: jax.Array) -> jax.Array:
    return jax.lax.scan(body, x, weights)[0].sum()


WEIGHTS = (shape(LAYERS, WIDTH, HIDDEN), shape(LAYERS, HIDDEN, WIDTH))
MATMUL = 2 * BATCH * WIDTH * HIDDEN


@pytest.mark.parametrize(
    ("subscripts", "left", "right", "flops"),
    [
        ("mk,kn->mn", (4, 8), (8, 16), 2 * 4 * 8 * 16),
        ("bmk,bkn->bmn", (3, 4, 8), (3, 8, 16), 3 * 2 * 4 * 8 * 16),
        ("bqgd,bkd->bgqk", (2, 5, 3, 8), (2, 7, 8), 2 * 2 * 3 * 5 * 7 * 8),
        ("abcd,cdef->abef", (2, 3, 4, 5), (4, 5, 6, 7), 2 * 2 * 3 * 4 * 5 * 6 * 7),
    ],
)
def test_products(subscripts, left, right, flops) -> None:
    found = analysed(functools.partial(jnp.einsum, subscripts), shape(*left), shape(*right))
    assert (found.flops, found.unknown_loops, found.collectives) == (flops, 0, ())


def test_a_scan_counts_every_layer() -> None:
    found = analysed(lambda weights, x: stack(block, weights, x), WEIGHTS, shape(BATCH, WIDTH))
    assert (found.flops, found.unknown_loops) == (LAYERS * 2 * MATMUL, 0)


@pytest.mark.parametrize(("remat", "products"), [(False, 2 + 4), (True, 2 + 2 + 4)])
def test_the_gradient_of_a_scan(remat, products) -> None:
    """Forward 2 products a layer, backward 4, and with rematerialisation the 2 again, the last of them for its tanh."""
    body = jax.checkpoint(block) if remat else block
    found = analysed(jax.grad(lambda weights, x: stack(body, weights, x)), WEIGHTS, shape(BATCH, WIDTH))
    assert (found.flops, found.unknown_loops) == (LAYERS * products * MATMUL, 0)


def test_nested_scans_multiply() -> None:
    def outer(x: jax.Array, weights) -> tuple[jax.Array, None]:
        return jax.lax.scan(block, x, weights)[0], None

    weights = (shape(3, LAYERS, WIDTH, HIDDEN), shape(3, LAYERS, HIDDEN, WIDTH))
    found = analysed(lambda weights, x: jax.lax.scan(outer, x, weights)[0], weights, shape(BATCH, WIDTH))
    assert (found.flops, found.unknown_loops) == (3 * LAYERS * 2 * MATMUL, 0)


def test_a_condition_counts_its_dearer_branch() -> None:
    def either(large, x, weight):
        return jax.lax.cond(large, lambda: jnp.tanh(x @ weight) @ weight.T, lambda: x)

    found = analysed(either, shape(dtype=bool), shape(BATCH, WIDTH), shape(WIDTH, HIDDEN))
    assert found.flops == 2 * MATMUL


def test_a_loop_of_unknown_length_counts_once() -> None:
    def loop(x, weight, limit):
        return jax.lax.while_loop(lambda x: x.sum() < limit, lambda x: x @ weight, x)

    found = analysed(loop, shape(BATCH, WIDTH), shape(WIDTH, WIDTH), shape())
    assert (found.flops, found.unknown_loops) == (2 * BATCH * WIDTH * WIDTH, 1)


def test_memory_of_a_scan_reads_one_layer_at_a_time() -> None:
    """Not all layers in every iteration, though that is what the slicing fusion is handed."""
    large = (shape(LAYERS, 256, 512), shape(LAYERS, 512, 256))
    found = analysed(lambda weights, x: stack(block, weights, x), large, shape(BATCH, 256))
    weights = LAYERS * 2 * 256 * 512 * 4
    # Read as slices, written, and read again by the products; a layout may take one more copy of one of the two.
    assert weights <= found.memory_bytes <= 5 * weights


def test_memory_of_an_update_in_place() -> None:
    update = jax.jit(lambda cache, row: cache.at[3].set(row), donate_argnums=0)
    text = update.lower(shape(1000, 64), shape(64)).compile().as_text()
    assert costs.analyse(text).memory_bytes <= 4 * 64 * 4


# Collectives, on the eight simulated devices.


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def placed(mesh, dims: tuple[int, ...], *spec) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))


@pytest.mark.parametrize(("axis", "group"), [("a", (0, 4)), ("b", (0, 1, 2, 3)), (("a", "b"), tuple(range(8)))])
def test_all_reduce_of_a_sharded_contraction(mesh, axis, group) -> None:
    product = jax.jit(jnp.matmul, out_shardings=NamedSharding(mesh, P()))
    text = product.lower(placed(mesh, (4, 64), None, axis), placed(mesh, (64, 16), axis)).compile().as_text()
    found = costs.analyse(text)
    (reduced,) = found.collectives
    assert (reduced.kind, reduced.group, reduced.times, reduced.depth) == ("all-reduce", group, 1, 0)
    assert collectives.along(group, dict(mesh.shape)) == (axis if isinstance(axis, tuple) else (axis,))
    assert reduced.operands == reduced.results == (Shape("f32", (4, 16)),)
    assert reduced.link_bytes == 2 * 4 * 16 * 4 * (len(group) - 1) / len(group)
    assert found.flops == 2 * 4 * 64 * 16 / len(group)
    assert "dot_general" in reduced.op_name


def test_collectives_inside_and_outside_of_a_scan(mesh) -> None:
    """Weights split over `a` are gathered layer by layer; the loss over rows split over `b` is summed once."""

    def layer(x, weight):
        return jnp.tanh(x @ jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, P()))), None

    def loss(weights, x):
        return jnp.square(jax.lax.scan(layer, x, weights)[0]).sum()

    step = jax.jit(loss, out_shardings=NamedSharding(mesh, P()))
    args = placed(mesh, (LAYERS, 64, 64), None, "a"), placed(mesh, (8, 64), "b")
    found = costs.analyse(step.lower(*args).compile().as_text()).collectives
    inside = [each for each in found if each.depth]
    assert [(each.kind, each.group, each.times, each.depth) for each in inside] == [("all-gather", (0, 4), LAYERS, 1)]
    assert sum(leaf.bytes for leaf in inside[0].results) == 64 * 64 * 4
    assert inside[0].link_bytes == 64 * 64 * 4 / 2
    assert [(each.kind, each.group, each.times) for each in found if not each.depth] == [
        ("all-reduce", (0, 1, 2, 3), 1)
    ]


@pytest.mark.parametrize(
    ("function", "kind", "sent"),
    [
        (functools.partial(jax.lax.psum, axis_name="b"), "all-reduce", 2 * 3 / 4),
        (functools.partial(jax.lax.all_gather, axis_name="b"), "all-gather", 3),
        (functools.partial(jax.lax.psum_scatter, axis_name="b", tiled=True), "reduce-scatter", 3 / 4),
        (
            functools.partial(jax.lax.all_to_all, axis_name="b", split_axis=0, concat_axis=1, tiled=True),
            "all-to-all",
            3 / 4,
        ),
        (
            functools.partial(jax.lax.ppermute, axis_name="b", perm=[(i, (i + 1) % 4) for i in range(4)]),
            "collective-permute",
            1,
        ),
    ],
)
def test_collectives_by_hand(mesh, function, kind, sent) -> None:
    mapped = jax.shard_map(function, mesh=mesh, in_specs=P("a", "b"), out_specs=P("a", "b"), check_vma=False)
    text = jax.jit(mapped).lower(placed(mesh, (16, 64), "a", "b")).compile().as_text()
    (found,) = costs.analyse(text).collectives
    assert (found.kind, found.group) == (kind, (0, 1, 2, 3))
    assert found.link_bytes == sent * 8 * 16 * 4


# Forms that the CPU's compiler does not write.

SUM = """
%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %z = f32[] add(%x, %y)
}
"""


def program(*lines: str, before: str = "") -> costs.Costs:
    body = "\n".join(f"  {line}" for line in lines)
    return costs.analyse(f"HloModule m, num_partitions=8\n{before}\nENTRY %main () -> f32[] {{\n{body}\n}}\n")


@pytest.mark.parametrize(
    ("groups", "group"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", (0, 1)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", (0, 1, 4, 5)),
        ("replica_groups=mesh['x'=2,'y'=4] {'x'}", (0, 4)),
        ("replica_groups=mesh['x'=2,'y'=4] {'y','x'}", (0, 4, 1, 5, 2, 6, 3, 7)),
        ("replica_groups=mesh['x'=2,'y'=4] {'y':(1)2}", (0, 2)),
        ("replica_groups=mesh['x'=2,'y'=4] {'y':(2)2}", (0, 1)),
        ("replica_groups=mesh['x'=4,'y'=2], device_ids=([4,2]<=[2,4]T(1,0)) {'x'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['x'=2,'y'=2], device_ids=(3,1,2,0) {'y'}", (3, 1)),
        ("replica_groups={}", tuple(range(8))),
        ("channel_id=1", tuple(range(8))),
    ],
)
def test_groups(groups, group) -> None:
    (found,) = program(
        "%p = f32[4]{0} parameter(0)",
        f"ROOT %r = f32[4]{{0}} all-reduce(%p), channel_id=1, {groups}, use_global_device_ids=true, to_apply=%sum",
        before=SUM,
    ).collectives
    assert found.group == group


def test_groups_that_are_not_understood() -> None:
    with pytest.raises(ValueError, match=r"replica groups of 'r' are not understood: 'mystery"):
        program("%p = f32[4]{0} parameter(0)", "ROOT %r = f32[4]{0} all-reduce(%p), replica_groups=mystery")


def test_permutations_along_rings_and_chains() -> None:
    found = program(
        "%p = f32[4]{0} parameter(0)",
        "%a = f32[4]{0} collective-permute(%p), source_target_pairs={{0,2},{2,4},{4,0},{1,3},{3,1}}",
        "ROOT %b = f32[4]{0} collective-permute(%p), source_target_pairs={{0,0},{1,2},{2,3}}",
    ).collectives
    assert [each.group for each in found] == [(0, 2, 4), (1, 2, 3)]


@pytest.mark.parametrize("typed", [False, True])
def test_asynchronous_pairs_count_once(typed) -> None:
    operand = "f32[4]{0} %p" if typed else "%p"
    found = program(
        "%p = f32[4]{0} parameter(0)",
        "%n = token[] after-all()",
        f"%g = (f32[4]{{0}}, f32[8]{{0}}) all-gather-start({operand}), replica_groups={{{{0,1}}}}, dimensions={{0}}",
        "%h = f32[8]{0} all-gather-done(%g)",
        f"%r = f32[4]{{0}} all-reduce-start({operand}), replica_groups={{{{0,1}}}}, to_apply=%sum",
        "%s = f32[4]{0} all-reduce-done(%r)",
        "%c = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}",
        "%d = f32[4]{0} collective-permute-done(%c)",
        "%e = ((f32[4]{0}), f32[2]{0}, s32[]) async-start(%p), calls=%wrapped",
        "%f = ((f32[4]{0}), f32[2]{0}, s32[]) async-update(%e)",
        "%o = f32[2]{0} async-done(%f)",
        "%k = ((f32[4]{0}, token[]), f32[8]{0}) call-start(%p, %n), to_apply=%other",
        "ROOT %l = f32[8]{0} call-done(%k)",
        before=SUM
        + """
%wrapped (q: f32[4]) -> f32[2] {
  %q = f32[4]{0} parameter(0)
  ROOT %t = f32[2]{0} reduce-scatter(%q), replica_groups={{0,1}}, dimensions={0}, to_apply=%sum
}

%other (u: f32[4], v: token[]) -> f32[8] {
  %u = f32[4]{0} parameter(0)
  %v = token[] parameter(1)
  ROOT %w = f32[8]{0} all-gather(%u), replica_groups={{0,1}}, dimensions={0}
}, execution_thread="sparsecore"
""",
    )
    kinds = ["all-gather", "all-reduce", "collective-permute", "reduce-scatter", "all-gather"]
    assert [each.kind for each in found.collectives] == kinds
    assert [each.results[0].dims for each in found.collectives] == [(8,), (4,), (4,), (2,), (8,)]
    assert [each.link_bytes for each in found.collectives] == [16, 16, 16, 8, 16]
    assert found.memory_bytes == (16 + 32) + (16 + 16) + (16 + 16) + (16 + 8) + (16 + 32)


def test_a_combined_all_reduce_lists_its_operands() -> None:
    (found,) = program(
        "%p = bf16[4,2]{1,0:T(8,128)(2,1)} parameter(0)",
        "%q = f32[3]{0:T(128)} parameter(1)",
        "ROOT %r = (bf16[4,2]{1,0:T(8,128)(2,1)}, /*index=1*/f32[3]{0:T(128)}) all-reduce(%p, /*index=1*/%q), "
        'replica_groups=[2,4]<=[8], to_apply=%sum, metadata={op_name="jit(step)/transpose(jvp())/add"}',
        before=SUM,
    ).collectives
    assert found.operands == found.results == (Shape("bf16", (4, 2)), Shape("f32", (3,)))
    assert found.link_bytes == 2 * (16 + 12) * 3 / 4
    assert found.op_name == "jit(step)/transpose(jvp())/add"


SCATTER = """
%all-reduce-scatter (p: bf16[64,16], q: bf16[16,64]) -> (bf16[16,16], bf16[16,16]) {
  %p = bf16[64,16]{1,0} parameter(0)
  %q = bf16[16,64]{1,0} parameter(1)
  %r = (bf16[64,16]{1,0}, bf16[16,64]{1,0}) all-reduce(%p, %q), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%sum
  %s = bf16[64,16]{1,0} get-tuple-element(%r), index=0
  %t = bf16[16,64]{1,0} get-tuple-element(%r), index=1
  %i = u32[] partition-id()
  %n = u32[] constant(0)
  %u = bf16[16,16]{1,0} dynamic-slice(%s, %i, %n), dynamic_slice_sizes={16,16}
  %v = bf16[16,16]{1,0} dynamic-slice(%t, %n, %i), dynamic_slice_sizes={16,16}
  ROOT %w = (bf16[16,16]{1,0}, bf16[16,16]{1,0}) tuple(%u, %v)
}
"""


def test_a_fused_all_reduce_that_is_sliced_is_a_reduce_scatter() -> None:
    (found,) = program(
        "%p = bf16[64,16]{1,0} parameter(0)",
        "%q = bf16[16,64]{1,0} parameter(1)",
        "ROOT %f = (bf16[16,16]{1,0}, bf16[16,16]{1,0}) fusion(%p, %q), kind=kCustom, calls=%all-reduce-scatter",
        before=SUM + SCATTER,
    ).collectives
    assert (found.kind, found.group) == ("reduce-scatter", (0, 2, 4, 6))
    assert found.results == (Shape("bf16", (16, 16)),) * 2
    assert found.link_bytes == 2 * 64 * 16 * 2 * 3 / 4


CHAIN = """
%start (p: bf16[4]) -> (bf16[4], bf16[8], u32[]) {
  %p = bf16[4]{0} parameter(0)
  %g = bf16[8]{0} all-gather(%p), channel_id=1, replica_groups={{0,1}}, frontend_attributes={chain_id="3"}
  ROOT %c = (bf16[4]{0}, bf16[8]{0}, u32[]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%step (p.1: bf16[4], r: bf16[8]) -> (bf16[8]) {
  %p.1 = bf16[4]{0} parameter(0)
  %r = bf16[8]{0} parameter(1)
  %g.1 = bf16[8]{0} all-gather(%p.1), channel_id=1, replica_groups={{0,1}}, frontend_attributes={chain_id="3"}
  ROOT %t = (bf16[8]{0}) tuple(%g.1)
}
"""


def test_a_chain_of_fusions_that_carries_one_all_gather_counts_once() -> None:
    found = program(
        "%q = bf16[4]{0} parameter(0)",
        "%f = (bf16[4]{0}, bf16[8]{0}, u32[]) fusion(%q), kind=kCustom, calls=%start",
        "%h = bf16[8]{0} get-tuple-element(%f), index=1",
        "ROOT %k = (bf16[8]{0}) fusion(%q, %h), kind=kOutput, calls=%step",
        before=CHAIN,
    ).collectives
    assert [(each.kind, each.link_bytes) for each in found] == [("all-gather", 8)]


@pytest.mark.parametrize(
    ("left", "right", "result", "attributes", "flops"),
    [
        ("bf16[64,32]", "bf16[32,48]", "bf16[64,48]", "dim_labels=bf_io->bf", 2 * 64 * 32 * 48),
        # A product of 32 heads: position o of the output meets only position o of the kernel.
        (
            "bf16[32,20,16]",
            "bf16[32,24,16]",
            "f32[32,20,24]",
            "window={size=32 stride=31 lhs_dilate=32}, dim_labels=0bf_0oi->0bf",
            32 * 2 * 20 * 24 * 16,
        ),
        # Two steps of a product whose weights travel around a ring, at once.
        (
            "bf16[64,2,16]",
            "bf16[2,16,48]",
            "bf16[64,48,1]",
            "window={size=2}, dim_labels=b0f_0io->bf0",
            2 * 64 * 48 * 32,
        ),
        (
            "bf16[64,16,1]",
            "bf16[16,2,48]",
            "bf16[64,2,48]",
            "window={size=2 pad=1_1 rhs_reversal=1}, dim_labels=bf0_i0o->b0f",
            2 * 64 * 16 * 2 * 48,
        ),
        # A convolution over images: 3 x 3 kernels, of which the borders see 2 of 3 positions.
        (
            "f32[1,8,8,4]",
            "f32[3,3,4,6]",
            "f32[1,8,8,6]",
            "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
            2 * 4 * 6 * (3 * 8 - 2) ** 2,
        ),
        (
            "f32[1,8,8,4]",
            "f32[3,3,1,4]",
            "f32[1,3,3,4]",
            "window={size=3x3 stride=2x2}, dim_labels=b01f_01io->b01f, feature_group_count=4",
            2 * 4 * (3 * 3) ** 2,
        ),
    ],
)
def test_convolutions(left, right, result, attributes, flops) -> None:
    found = program(
        f"%p = {left} parameter(0)",
        f"%q = {right} parameter(1)",
        f"ROOT %c = {result} convolution(%p, %q), {attributes}",
    )
    assert found.flops == flops


def test_positions_of_convolutions_one_by_one() -> None:
    """The count in closed form, against trying every pair of positions."""
    sizes = [(7, 3, 5), (1, 4, 2), (6, 5, 9)]
    for (size, kernel, result), stride, pad, dilation, kernel_dilation in itertools.product(
        sizes, (1, 2, 5), (-2, 0, 3), (1, 2, 6), (1, 3)
    ):
        met = [o * stride + k * kernel_dilation - pad for o in range(result) for k in range(kernel)]
        count = sum(at % dilation == 0 and 0 <= at // dilation < size for at in met)
        assert matrices.positions(size, kernel, result, stride, pad, dilation, kernel_dilation) == count


def test_a_product_by_a_library_of_the_gpu() -> None:
    found = program(
        "%p = bf16[64,32]{1,0} parameter(0)",
        "%q = bf16[32,48]{1,0} parameter(1)",
        "ROOT %c = (bf16[64,48]{1,0}, s8[4096]{0}) custom-call(%p, %q), "
        'custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"alpha_real":1,'
        '"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}',
    )
    assert found.flops == 2 * 64 * 32 * 48


LOOP = """
%body (s: (s32[], f32[4,4], s32[])) -> (s32[], f32[4,4], s32[]) {
  %s = (s32[], f32[4,4]{1,0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[4,4]{1,0} get-tuple-element(%s), index=1
  %n = s32[] get-tuple-element(%s), index=2
  %two = s32[] constant(STEP)
  %j = s32[] add(%i, %two)
  %y = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], f32[4,4]{1,0}, s32[]) tuple(%j, %y, %n)
}

%condition (s.1: (s32[], f32[4,4], s32[])) -> pred[] {
  %s.1 = (s32[], f32[4,4]{1,0}, s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %n.1 = s32[] get-tuple-element(%s.1), index=2
  ROOT %c = pred[] compare(%i.1, %n.1), direction=DIRECTION
}
"""


@pytest.mark.parametrize(
    ("first", "step", "last", "direction", "trips"),
    [
        (0, 1, 8, "LT", 8),
        (0, 2, 8, "LT", 4),
        (1, 3, 8, "LE", 3),
        (7, -1, 0, "GE", 8),
        (8, -2, 0, "GT", 4),
        (0, 2, 8, "NE", 4),
        (0, 1, 0, "LT", 0),
        (0, -1, 8, "LT", None),
        (0, 1, 8, "EQ", None),
    ],
)
def test_trip_counts_from_the_condition(first, step, last, direction, trips) -> None:
    """As TPUs write it: no known_trip_count, and the limit is handed in with the loop's state."""
    found = program(
        f"%z = s32[] constant({first})",
        "%p = f32[4,4]{1,0} parameter(0)",
        f"%n.2 = s32[] constant({last})",
        "%s.2 = (s32[], f32[4,4]{1,0}, s32[]) tuple(%z, %p, %n.2)",
        "ROOT %w = (s32[], f32[4,4]{1,0}, s32[]) while(%s.2), condition=%condition, body=%body",
        before=LOOP.replace("STEP", str(step)).replace("DIRECTION", direction),
    )
    assert (found.flops, found.unknown_loops) == ((1 if trips is None else trips) * 2 * 4**3, int(trips is None))


def test_operands_that_a_fusion_inside_only_renames_are_read() -> None:
    text = """HloModule m, is_scheduled=true

%renamed (r: f32[8,16]) -> f32[8,16] {
  %r = f32[8,16]{1,0} parameter(0)
  ROOT %b = f32[8,16]{0,1} bitcast(%r)
}

%product (p: f32[4,8], q: f32[8,16]) -> f32[4,16] {
  %p = f32[4,8]{1,0} parameter(0)
  %q = f32[8,16]{1,0} parameter(1)
  %inside = f32[8,16]{0,1} fusion(%q), kind=kLoop, calls=%renamed
  ROOT %c = f32[4,16]{1,0} dot(%p, %inside), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: f32[4,8], w: f32[8,16]) -> f32[4,16] {
  %x = f32[4,8]{1,0} parameter(0)
  %w = f32[8,16]{1,0} parameter(1)
  ROOT %y = f32[4,16]{1,0} fusion(%x, %w), kind=kOutput, calls=%product
}
"""
    assert costs.analyse(text).memory_bytes == 4 * (4 * 8 + 8 * 16 + 4 * 16)


def test_what_a_tpu_keeps_in_vmem_is_no_traffic() -> None:
    found = program(
        "%p = f32[8,128]{1,0:T(8,128)} parameter(0)",
        "%c = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p)",
        "%d = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%c)",
        "ROOT %e = f32[8,128]{1,0:T(8,128)S(1)} negate(%d)",
    )
    assert found.memory_bytes == 8 * 128 * 4


def test_unknown_opcodes_and_names_without_signs() -> None:
    found = program(
        "p = f32[8,4]{1,0} parameter(0)",
        "q = (f32[8,4]{1,0}, token[]) surprise(f32[8,4]{1,0} p), answer={42}, calls=%nothing",
        "r = f32[8,4]{1,0} get-tuple-element(q), index=0",
        "ROOT c = f32[8,8]{1,0} dot(r, p), lhs_contracting_dims={1}, rhs_contracting_dims={1}",
    )
    assert found.flops == 2 * 8 * 8 * 4
    assert found.memory_bytes == 2 * 128 + (2 * 128 + 256)


@pytest.mark.parametrize("text", ["", "module @jit_f {", "HloModule m\n"])
def test_a_text_that_is_no_program(text) -> None:
    with pytest.raises(ValueError, match="HLO module"):
        costs.analyse(text)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("f32", 40), ("bf16", 20), ("s4", 5), ("pred", 10), ("f8e4m3fn", 10), ("f4e2m1fn", 5), ("c64", 80), ("token", 0)],
)
def test_bytes_of_types(dtype, size) -> None:
    assert Shape(dtype, (10,)).bytes == size


def test_link_bytes_by_kind() -> None:
    one = collectives.Collective("all-gather", (Shape("s8", (4,)),), (Shape("s8", (8,)),), (0, 1), times=3)
    two = collectives.Collective("all-reduce", (Shape("s8", (64,)),), (Shape("s8", (64,)),), (0, 1))
    assert costs.Costs(collectives=(one, two, one)).link_bytes() == {"all-reduce": 64, "all-gather": 24}


def test_the_parser_takes_nested_tuples() -> None:
    text = "HloModule m\nENTRY %e () -> f32[] {\n  %p = ((f32[2]{0}, ()), /*index=1*/s32[<=3]) parameter(0)\n}"
    (parameter,) = hlo.parse(text).entry.instructions.values()
    assert parameter.shape == ((Shape("f32", (2,)), ()), Shape("s32", (3,)))
