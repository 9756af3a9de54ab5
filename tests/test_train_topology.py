"""Topologies, meshes over them, and programs compiled for devices that are not there."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train import costs, topology
from train.chips import CHIPS, GIB

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def tpu(function):
    return pytest.mark.topology(needs_libtpu(function))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", "'v9:2x2' is no topology; expected a generation and a shape like v4:8x16x16, v5e:16x16"),
        ("v5e", "'v5e' is no topology"),
        ("v5e:0x2", "'v5e:0x2' is no topology"),
        ("v5e:3x3", "v5e:3x3 is no slice of v5e; the nearest are v5e:2x4, v5e:4x4"),
        ("v5e:32x32", "v5e:32x32 is no slice of v5e; the nearest are v5e:8x16, v5e:16x16"),
        ("v5p:4x4", "v5p:4x4 is no slice of v5p; the nearest are v5p:2x2x2, v5p:2x2x4"),
        ("cuda:8", "'cuda:8': expected slices x hosts x GPUs"),
        ("cpu:many", "'cpu:many' is no topology"),
        ("cpu:999", "set XLA_FLAGS=--xla_force_host_platform_device_count=999 before it starts"),
    ],
)
def test_names_that_are_not_known(name, message) -> None:
    with pytest.raises(topology.TopologyError) as caught:
        topology.named(name)
    assert message in str(caught.value)


def test_compilers_that_are_not_installed(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(topology.TopologyError, match=r"v5e:2x2: .* pip install 'jaxpeft\[plan\]'"):
        topology.named("v5e:2x2")

    with pytest.raises(topology.TopologyError, match=r"cuda:1x1x8: .* pip install 'jax\[cuda13\]'"):
        topology.named("cuda:1x1x8")


def test_a_compiler_that_failed_to_load(monkeypatch) -> None:
    def unknown(**options):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(topology.topologies, "get_topology_desc", unknown)
    with pytest.raises(topology.TopologyError, match="was not loaded; without a GPU, set JAX_PLATFORMS=cpu"):
        topology.named("cuda:1x1x8")


def test_figures_are_those_of_one_device() -> None:
    v4, v5e = CHIPS["v4"].per_device, CHIPS["v5e"].per_device
    assert (v4.flops, v4.hbm_bytes, v4.devices) == (137.5e12, 16 * GIB, 1)
    assert v5e == CHIPS["v5e"]
    assert set(topology.SHAPES) | {"H100 SXM"} == set(CHIPS)


def test_a_mesh_of_simulated_devices() -> None:
    devices = topology.named("cpu:8")
    assert (devices.platform, devices.chip, devices.device) == ("cpu", None, None)
    mesh = topology.mesh(devices, {"data": 2, "model": 4})
    assert dict(mesh.shape) == {"data": 2, "model": 4}
    assert mesh.axis_types == (AxisType.Auto,) * 2
    assert [device.id for device in mesh.devices.flat] == list(range(8))
    with pytest.raises(topology.TopologyError, match="the mesh data=3 x model=2 has 6 devices, cpu:8 has 8"):
        topology.mesh(devices, {"data": 3, "model": 2})


def test_compiling_for_simulated_devices() -> None:
    devices = topology.cpu(4)
    mesh = topology.mesh(devices, {"model": 4})
    arrays = [
        jax.ShapeDtypeStruct(dims, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))
        for dims, spec in [((8, 16), (None, "model")), ((16, 8), ("model",))]
    ]
    program = topology.compile(jax.jit(jnp.matmul, out_shardings=NamedSharding(mesh, P())), *arrays, topology=devices)
    assert program.seconds > 0
    assert costs.analyse(program.compiled.as_text()).flops == 2 * 8 * 16 * 8 / 4


FAR = """RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (21.99G) exceeds \
available HBM (15.75G)."""
# As printed where the program nearly fits; the paths and all but two allocations are left out.
NEAR = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 63.80G of 30.75G \
hbm. Exceeded hbm capacity by 33.05G.

Total hbm usage >= 65.05G:
    reserved          1.25G
    program          63.80G
    arguments            0B

Output size 0B; shares 0B with arguments.

Program hbm requirement 63.80G:
    global            1.14M
    scoped            4.56M
    HLO temp         63.79G (100.0% utilization: Unpadded (63.58G) Padded (63.58G), 0.3% fragmentation (210.89M))

  Largest program allocations in hbm:

  1. Size: 2.00G
     Operator: op_name="jit(step)/jit(main)/jvp()/transformer/h/0/self_attention/dot_general[precision=None]" source_line=1059
     Shape: f32[32,4096,4096]{1,2,0:T(8,128)}
     Unpadded size: 2.00G
     XLA label: fusion.1265.remat3 = fusion(custom-call.224, custom-call.241, custom-call.22), kind=kOutput
     Allocation type: HLO temp
     ==========================

  2. Size: 512.5M
     Shape: bf16[4096,65536]{1,0:T(8,128)(2,1)}
     Unpadded size: 512.0M
     Allocation type: HLO temp
     ==========================
"""  # noqa: E501


def test_messages_about_memory() -> None:
    far, near = topology.OutOfMemory.parse(FAR), topology.OutOfMemory.parse(NEAR)
    assert (far.used, far.available, far.allocations) == (21.99 * GIB, 15.75 * GIB, ())
    assert (near.used, near.available) == (63.80 * GIB, 30.75 * GIB)
    first, second = near.allocations
    assert (first.bytes, first.shape) == (2 * GIB, "f32[32,4096,4096]{1,2,0:T(8,128)}")
    assert first.op_name.endswith("self_attention/dot_general[precision=None]")
    assert (second.bytes, second.op_name) == (512.5 * 2**20, "")
    assert str(far) == "out of memory: 21.99 GiB needed, 15.75 GiB available"
    assert topology.OutOfMemory.parse("INVALID_ARGUMENT: something else") is None
    assert topology.OutOfMemory.parse("RESOURCE_EXHAUSTED: too many files") is None


@tpu
@pytest.mark.parametrize(
    ("name", "devices", "memory"),
    [("v4:2x2x1", 8, 16), ("v5e:1x1", 1, 16), ("v5e:2x4", 8, 16), ("v6e:2x2", 4, 32), ("tpu7x:2x2x1", 8, 96)],
)
def test_devices_of_tpus(name, devices, memory) -> None:
    found = topology.named(name)
    assert (len(found.devices), found.platform) == (devices, "tpu")
    assert found.device.hbm_bytes == memory * GIB
    assert dict(topology.mesh(found, {"data": devices}).shape) == {"data": devices}
    assert jax.default_backend() == "cpu"


@tpu
def test_axes_that_split_the_torus() -> None:
    mesh = topology.mesh(topology.named("v5e:4x4"), {"data": 8, "model": 2})
    assert (mesh.devices.shape, len({device.id for device in mesh.devices.flat})) == ((8, 2), 16)


@tpu
def test_a_program_that_does_not_fit() -> None:
    found = topology.named("v5e:2x2")
    # In no mesh: the devices of the topology suffice for a program of one.
    place = NamedSharding(Mesh(np.array(found.devices[:1]), ("data",)), P())
    large = jax.ShapeDtypeStruct((2**15, 2**19), jnp.bfloat16, sharding=place)
    with pytest.raises(topology.OutOfMemory) as caught:
        topology.compile(jax.jit(jnp.sin), large, topology=found)
    assert caught.value.available == 15.75 * GIB
    assert caught.value.used >= 32 * GIB


LAYERS, ROWS, LENGTH, WIDTH, HIDDEN = 6, 8, 128, 256, 1024


def layer(x: jax.Array, weights: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    return x + jax.nn.silu(x @ weights[0]) @ weights[1], None


@tpu
@pytest.mark.parametrize("remat", [False, True])
def test_a_training_step_for_a_tpu(remat) -> None:
    """Its products are convolutions and its loops say no trip count, yet the figures are the analytic ones."""
    found = topology.named("v5e:2x2")
    mesh = topology.mesh(found, {"fsdp": 4})

    def array(*dims: int, spec: P, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))

    def step(weights, x):
        body = jax.checkpoint(layer) if remat else layer
        grads = jax.grad(lambda weights: jnp.square(jax.lax.scan(body, x, weights)[0].astype(jnp.float32)).sum())(
            weights
        )
        return jax.tree.map(lambda weight, grad: weight - grad, weights, grads)

    weights = (
        array(LAYERS, WIDTH, HIDDEN, spec=P(None, "fsdp")),
        array(LAYERS, HIDDEN, WIDTH, spec=P(None, None, "fsdp")),
    )
    x = array(ROWS, LENGTH, WIDTH, spec=P("fsdp"))
    shardings = jax.tree.map(lambda weight: weight.sharding, weights)
    program = topology.compile(jax.jit(step, out_shardings=shardings), weights, x, topology=found)
    counted = costs.analyse(program.compiled.as_text())
    product = 2 * ROWS * LENGTH * WIDTH * HIDDEN / 4
    # Forward 2, backward 4; of the recomputation only the first is needed.
    assert counted.flops == pytest.approx(LAYERS * (7 if remat else 6) * product, rel=0.03)
    assert counted.unknown_loops == 0
    moved = [each for each in counted.collectives if each.depth]
    assert all(each.times % LAYERS == 0 and set(each.group) == {0, 1, 2, 3} for each in moved)
    # Gathering two weights forward and backward and summing their gradients sends as much as three gathers of each;
    # where the gradient is summed everywhere instead of scattered, as much as four.
    gathered = LAYERS * 2 * WIDTH * HIDDEN * 2 * 3 / 4
    assert 2.5 * gathered <= sum(counted.link_bytes().values()) <= 4.5 * gathered


@pytest.mark.topology
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="jax[cuda13] is not installed")
def test_a_program_for_gpus() -> None:
    found = topology.named("cuda:1x1x8")
    mesh = topology.mesh(found, {"data": 8})
    weight = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
    x = jax.ShapeDtypeStruct((8192, 1024), jnp.bfloat16, sharding=NamedSharding(mesh, P("data")))
    gradient = jax.grad(lambda weight, x: jnp.square((x @ weight).astype(jnp.float32)).mean())
    counted = costs.analyse(topology.compile(jax.jit(gradient), weight, x, topology=found).compiled.as_text())
    assert counted.flops == pytest.approx(2 * 2 * 1024**3)
    assert [(each.kind, each.group) for each in counted.collectives] == [("all-reduce", tuple(range(8)))]
