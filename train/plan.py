"""Does a run fit a machine that is not there, and what bounds its speed? From shapes, by compiling the real step."""

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax

import jaxpeft
from jaxpeft.methods import METHODS, TYPICAL
from jaxpeft.spec import name_of, nearest
from train import costs, devices, hlo, job, optim, task, topology
from train.config import Config, ConfigError
from train.topology import OutOfMemory, Topology

ROOM = ("v6e", "v5p", "tpu7x")
"""TPUs with more memory than the smallest: where a step that does not fit is compiled to see what it holds."""


@dataclass(frozen=True)
class Buffer:
    """An array of a compiled step: its size on one device, what it is, and where it comes from."""

    bytes: int
    shape: str
    origin: str


@dataclass(frozen=True)
class Plan:
    """One training step on one machine, all figures per device.

    Attributes:
      model, method, topology: names.
      mesh: sizes of its axes.
      batch: sequences of a step and their length.
      trained: trained parameters.
      fits: whether the peak of memory is within a device's.
      hbm_bytes: a device's memory.
      peak_bytes: most memory at one time, arguments included. None if not even a larger chip's compiler could tell.
      argument_bytes: base, adapter, optimizer state and batch.
      temporary_bytes: activations and all else that a step makes.
      flops: of products, the bodies of loops as often as they run; nothing elementwise.
      memory_bytes: to and from main memory, at quick effort an upper bound (`train.costs`).
      ici_bytes: sent to other devices.
      collectives: {kind: bytes} of `ici_bytes`.
      roofline_seconds: the largest of the three terms at the chip's published figures; None of a CPU.
      terms: {what: seconds}.
      compile_seconds: tracing and compiling.
      effort: the compiler's, of `topology.EFFORTS`.
      buffers: the largest arrays.
      remedies: what was tried where it does not fit, and the peak with it.
      seen_on: where it does not fit, the devices with more memory that it was compiled for instead.
    """

    model: str
    method: str
    topology: str
    mesh: dict[str, int]
    batch: tuple[int, int]
    trained: int
    fits: bool
    hbm_bytes: float
    peak_bytes: int | None
    argument_bytes: int
    temporary_bytes: int | None
    flops: float | None
    memory_bytes: float | None
    ici_bytes: float | None
    collectives: dict[str, float]
    roofline_seconds: float | None
    terms: dict[str, float]
    compile_seconds: float
    effort: str
    buffers: tuple[Buffer, ...] = ()
    remedies: tuple[tuple[str, int | None, bool], ...] = ()
    seen_on: str = ""

    @property
    def bound(self) -> str:
        """The term that the roofline is bound by."""
        return max(self.terms, key=self.terms.__getitem__) if self.terms else ""

    @property
    def overestimated(self) -> bool:
        """Whether the roofline rests on bytes to memory that a program of full effort would spare."""
        return self.effort == "quick" and self.bound == "memory" and self.topology.partition(":")[0] in topology.SHAPES

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens a second of each chip, padding included, if the roofline were reached."""
        if self.roofline_seconds is None:
            return None
        return math.prod(self.batch) / self.roofline_seconds / math.prod(self.mesh.values())

    def to_dict(self) -> dict[str, Any]:
        """The figures, JSON-able."""
        return dataclasses.asdict(self) | {"bound": self.bound, "tokens_per_second": self.tokens_per_second}


def plan(config: Config, machine: Topology, *, effort: str = "quick", remedies: bool = True) -> Plan:
    """Compiles one training step of a run for a machine.

    Args:
      config: the run; of its data only `max_length` counts, and no file is read but the model's config.json, and not
        even that for those in `jaxpeft.models.ARCHITECTURES`.
      machine: from `topology.named`.
      effort: the compiler's, of `topology.EFFORTS`. Full takes minutes, and tells what goes through main memory.
      remedies: whether, where it does not fit, changes are tried until it does, at quick effort.

    Raises:
      ConfigError: the mesh does not fit the machine, or the batch the mesh.
    """
    step = _Step(config, machine, effort)
    try:
        program = step.compile()
    except OutOfMemory as error:
        found = _with_room(step, error)
    else:
        found = step.describe(program)
    if remedies and not found.fits:
        found = dataclasses.replace(found, remedies=tuple(_remedies(config, machine)))
    return found


def plans(
    config: Config, machines: Sequence[Topology], methods: Sequence[str], *, effort: str = "quick"
) -> Iterator[Plan]:
    """A plan for each machine and method; the configuration's own method is as configured, others are typical."""
    if unknown := [name for name in methods if name not in METHODS]:
        raise ConfigError([f"--methods: unknown method {name!r}; {nearest(name, METHODS)}" for name in unknown])
    for machine in machines:
        for name in methods or (name_of(config.method),):
            spec = config.method if name == name_of(config.method) else TYPICAL[name]
            one = len(machines) == len(methods or "1") == 1
            yield plan(dataclasses.replace(config, method=spec), machine, effort=effort, remedies=one)


class _Step:
    """The training step of a run on a machine's mesh, with the shapes of all that it takes."""

    def __init__(self, config: Config, machine: Topology, effort: str = "quick"):
        sizes = devices.sizes(config.mesh, len(machine.devices))
        job.check_batch(config, sizes)
        self.config, self.machine, self.effort = config, machine, effort
        self.mesh = topology.mesh(machine, sizes)
        self.subject = job.of_shapes(config, self.mesh)
        optimizer = optim.optimizer(config.optimizer, 1000, config.method)
        kind = task.of(config)
        multiple = math.lcm(kind.multiple, sizes["sequence"])
        longest = kind.longest(config, self.subject.model)
        self.batch = (config.train.batch_size, -(-longest // multiple) * multiple)
        self.arguments = optim.argument_shapes(config, optimizer, self.subject, self.batch)
        self.step = optim.compiled_step(config, optimizer, self.subject)

    def compile(self) -> topology.Program:
        with jax.set_mesh(self.mesh):
            return topology.compile(self.step.jitted, *self.arguments, topology=self.machine, effort=self.effort)

    def describe(self, program: topology.Program) -> Plan:
        memory, text = program.compiled.memory_analysis(), program.compiled.as_text()
        cost = costs.analyse(text)
        peak = memory.peak_memory_in_bytes
        if self.machine.platform == "cpu":  # Whose analysis leaves out what a step makes.
            peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        sent = cost.link_bytes()
        terms = self.terms(cost.flops, cost.memory_bytes, sum(sent.values()))
        return self._plan(
            fits=peak <= self.available,
            peak_bytes=peak,
            temporary_bytes=memory.temp_size_in_bytes,
            flops=cost.flops,
            memory_bytes=cost.memory_bytes,
            ici_bytes=sum(sent.values()),
            collectives=sent,
            roofline_seconds=max(terms.values(), default=None),
            terms=terms,
            compile_seconds=program.seconds,
            buffers=_largest(text),
        )

    def terms(self, flops: float, memory_bytes: float, link_bytes: float) -> dict[str, float]:
        """Seconds that each resource of the chip needs at least; nothing is known of a CPU's."""
        device = self.machine.device
        if device is None:
            return {}
        return {
            "compute": flops / device.flops,
            "memory": memory_bytes / device.hbm_bandwidth,
            "links": link_bytes / device.link_bandwidth,
        }

    def unknown(self) -> Plan:
        """What is known of a step that no compiler could place."""
        nothing = dict.fromkeys(("peak_bytes", "temporary_bytes", "flops", "memory_bytes", "ici_bytes"))
        return self._plan(fits=False, **nothing, collectives={}, roofline_seconds=None, terms={}, compile_seconds=0.0)

    @property
    def available(self) -> float:
        """Memory of a device: a chip's, or a share of this machine's for simulated ones."""
        if self.machine.device is not None:
            return self.machine.device.hbm_bytes
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(self.machine.devices)

    def _plan(self, **figures: Any) -> Plan:
        arguments = sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(self.arguments)
        )
        return Plan(
            model=self.config.model.name,
            method=name_of(self.config.method),
            topology=self.machine.name,
            mesh=dict(self.mesh.shape),
            batch=self.batch,
            trained=jaxpeft.count(self.subject.adapter),
            hbm_bytes=self.available,
            argument_bytes=arguments,
            effort=self.effort,
            **figures,
        )


def _with_room(asked: _Step, error: OutOfMemory) -> Plan:
    """The plan of a step that does not fit, seen on as many devices with more memory."""
    needed = int(error.used)
    for roomy in _roomier(asked.machine):
        step = _Step(asked.config, roomy, asked.effort)
        try:
            seen = step.describe(step.compile())
        except OutOfMemory as again:
            error = again
            continue
        terms = asked.terms(seen.flops, seen.memory_bytes, seen.ici_bytes)
        return dataclasses.replace(
            seen,
            topology=asked.machine.name,
            seen_on=roomy.name,
            fits=False,
            peak_bytes=max(seen.peak_bytes, needed),
            hbm_bytes=asked.available,
            terms=terms,
            roofline_seconds=max(terms.values()),
        )
    listed = tuple(Buffer(int(each.bytes), each.shape, each.op_name) for each in error.allocations)
    return dataclasses.replace(asked.unknown(), buffers=listed)


def _roomier(machine: Topology) -> Iterator[Topology]:
    """As many devices with more memory: TPUs, the smallest first; at last this process's CPU, if it has as many."""
    for generation in ROOM:
        chip = topology.CHIPS[generation]
        if machine.device is None or chip.per_device.hbm_bytes <= machine.device.hbm_bytes:
            continue
        for shape in topology.SHAPES[generation]:
            if math.prod(map(int, shape.split("x"))) * chip.devices == len(machine.devices):
                yield topology.named(f"{generation}:{shape}")
                break
    if len(jax.devices("cpu")) >= len(machine.devices):
        yield topology.cpu(len(machine.devices))


def _largest(text: str) -> tuple[Buffer, ...]:
    """The largest arrays outside of fusions, one of each shape and origin."""
    module = hlo.parse(text)
    fused = {
        name
        for each in module.computations.values()
        for one in each.instructions.values()
        if one.opcode == "fusion"
        for name in one.called("calls")
    }
    found: dict[tuple[str, str], Buffer] = {}
    skipped = ("tuple", "get-tuple-element", "bitcast", "while", "constant")
    for computation in module.computations.values():
        if computation.name in fused:
            continue
        for one in computation.instructions.values():
            if one.opcode in skipped or not isinstance(one.shape, hlo.Shape):
                continue
            shape = f"{one.shape.dtype}{list(one.shape.dims)}"
            origin = (one.op_name or one.name).replace("\\'", "'")
            found[shape, origin] = Buffer(one.shape.bytes, shape, origin)
    return tuple(sorted(found.values(), key=lambda buffer: -buffer.bytes)[:5])


def _remedies(config: Config, machine: Topology) -> Iterator[tuple[str, int | None, bool]]:
    """(change, peak with it, whether it fits then), each on top of those before it, until one fits."""
    changes: dict[str, Any] = {}
    for change in _changes(config, machine):
        together = changes | change
        changed = config
        for path, value in together.items():
            section, key = path.split(".")
            part = dataclasses.replace(getattr(changed, section), **{key: value})
            changed = dataclasses.replace(changed, **{section: part})
        said = " ".join(f"{path}={value}" for path, value in together.items())
        try:
            step = _Step(changed, machine)
            found = step.describe(step.compile())
        except ConfigError:  # For instance weights that blocks do not divide: not a remedy here.
            continue
        except OutOfMemory:
            found = None
        changes = together
        yield said, found and found.peak_bytes, found is not None and found.fits
        if found is not None and found.fits:
            return


def _changes(config: Config, machine: Topology) -> Iterator[dict[str, Any]]:
    """What takes less memory, the cheapest first. The loss needs no change: it is cut into pieces by itself."""
    if config.model.remat != "full":
        yield {"model.remat": "full"}
    sizes = devices.sizes(config.mesh, len(machine.devices))
    rows = sizes["data"] * sizes["fsdp"]
    for parts in (2, 4, 8):
        accumulate = config.train.accumulate * parts
        if config.train.batch_size % (accumulate * rows) == 0:
            yield {"train.accumulate": accumulate}
    if sizes["data"] > 1:
        yield {"mesh.data": 1, "mesh.fsdp": -1}
    if config.model.quantize is None:
        yield {"model.quantize": "nf4"}
    yield {"data.max_length": (config.data.max_length - 1) // 2 + 1}
