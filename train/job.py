"""What a configuration stands for: the model, the adapter and the data, ready to be trained or measured."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import jaxpeft
from jaxpeft import models
from jaxpeft.adapter import Adapter
from jaxpeft.methods import full, mixed
from jaxpeft.models.encoder_model import HEAD
from jaxpeft.models.loading import ModelFileError
from jaxpeft.spec import Spec
from train import data, devices, optim, task
from train.config import Config, ConfigError
from train.task import Task


@dataclass(frozen=True)
class Subject:
    """A base model and an adapter for it.

    Attributes:
      mesh: all devices.
      model: a language model, or an encoder; its functions take the parameters, so `base` is held here once.
      base: its frozen parameters, loaded straight to their shards.
      adapter: new, so the adapted model is the base model. It trains a head as a whole.
      key: random key of the dropout.
      losses: (params, **arrays of a batch without its weights) -> losses of the shape of the weights.
      outputs: names of the outputs of the head; empty where there is none.
      template: turns rows into examples: a `Template` of conversations, or what its task has instead; None where all is
        shapes.
    """

    mesh: Mesh
    model: Any
    base: Any
    adapter: Adapter
    key: jax.Array
    losses: Callable
    outputs: tuple[str, ...] = ()
    template: Any = None

    @property
    def shardings(self) -> Any:
        """How the base lies on the mesh."""
        return jaxpeft.sharding.of(self.base)

    @property
    def stored(self) -> Adapter:
        """How an adapter lies on the mesh."""
        return jaxpeft.sharding.adapter(self.adapter, self.shardings)


@dataclass(frozen=True, kw_only=True)
class Job(Subject):
    """A subject and the data it is trained on and measured by.

    Attributes:
      examples, lengths: the training rows, tokenised, and their lengths in positions.
      batches: every batch of the run, in order.
      held_out, held_out_examples: the rows it is measured on, and their tokens.
      notes: what was read, cut and dropped.
    """

    config: Config
    examples: Sequence[Any]
    lengths: np.ndarray
    batches: Sequence[data.Batch]
    held_out: Sequence[Any]
    held_out_examples: Sequence[Any]
    notes: Sequence[str]

    @property
    def task(self) -> Task:
        """What is learned."""
        return task.of(self.config)

    def collate(self, batch: data.Batch, rows: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """The arrays of a training batch, or of some of its sequences."""
        return self.task.collate(batch, self.examples, self.config, self.template, rows)


def subject(config: Config, weights: bool = True, train_rows: Sequence[Any] | None = None) -> Subject:
    """Loads the model and makes the adapter.

    Args:
      config: the run.
      weights: False gives shapes in place of arrays.
      train_rows: what the outputs of a head are named after, where the configuration does not name them.
    """
    mesh = devices.mesh(config.mesh)
    outputs = task.of(config).outputs(config, train_rows)
    model = _prepared(config, pretrained(config, mesh, weights), outputs)
    # Made on the mesh, because a random key cannot be moved to other processes.
    keys = jax.jit(
        lambda: tuple(jax.random.split(jax.random.key(config.train.seed))), out_shardings=devices.everywhere(mesh)
    )
    adapter_key, dropout_key = keys()
    adapter = _adapter(config, model, outputs, adapter_key, weights)
    losses, template = task.of(config).losses(config, model), task.of(config).reader(config, model)
    return Subject(mesh, model, model.params, adapter, dropout_key, losses, outputs, template)


def of_shapes(config: Config, mesh: Mesh) -> Subject:
    """A subject of shapes on any mesh, its devices present or not; without a tokenizer, where files are not needed."""
    if config.model.name in models.ARCHITECTURES:
        architecture = models.ARCHITECTURES[config.model.name]
        numerics = {"dtype": config.model.dtype, "param_dtype": config.model.dtype, "remat": config.model.remat}
        shape = dataclasses.replace(architecture, **numerics)
        if config.model.quantize == "gguf":
            raise ConfigError([f"model.quantize: {config.model.name} is an architecture, and has no blocks of its own"])
        model = _quantized(config, models.shapes(shape, mesh=mesh, source=config.model.name))
    else:
        model = pretrained(config, mesh, weights=False)
    outputs = task.of(config).outputs(config, None)
    model = _prepared(config, model, outputs)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=devices.everywhere(mesh))
    adapter = _adapter(config, model, outputs, key, weights=False)
    return Subject(mesh, model, model.params, adapter, key, task.of(config).losses(config, model), outputs)


def with_head(spec: Spec, outputs: Sequence[str]) -> Spec:
    """The spec of an adapter that also trains a head whole, if there is one."""
    if not outputs:
        return spec
    head = (f"{HEAD}/.*", full.Spec())
    if isinstance(spec, mixed.Spec):
        return dataclasses.replace(spec, overrides=(head, *spec.overrides))
    return mixed.Spec(default=spec, overrides=(head,))


def head_size(adapter: Adapter) -> int:
    """Trained parameters of the head; 0 where there is none."""
    return sum(leaf.size for name in adapter.params if _of_head(name) for leaf in jax.tree.leaves(adapter.params[name]))


def check_generation(config: Config) -> None:
    """Raises ConfigError unless the task is to write text."""
    if config.task.kind != "generation":
        raise ConfigError([f"task.kind: {config.task.kind} writes no text; expected generation"])


def _of_head(path: str) -> bool:
    return path.startswith(f"{HEAD}/")


def _prepared(config: Config, model: Any, outputs: Sequence[str]) -> Any:
    """The model, set up for the task, with a head if it needs one."""
    model = task.of(config).model(config, model)
    return model.with_head(len(outputs)) if outputs else model


def pretrained(config: Config, mesh: Mesh | None, weights: bool = True) -> Any:
    """The model of the configuration, in few bits if it says so; without `weights`, its shapes."""
    name, dtype = config.model.name, config.model.dtype
    try:
        kept = config.model.quantize == "gguf"
        model = models.pretrained(name, dtype=dtype, mesh=mesh, weights=weights, keep_blocks=kept)
    except ModelFileError:  # a file is damaged, and no setting is wrong
        raise
    except ValueError as error:  # no such model, or one of an unknown architecture
        raise ConfigError([f"model.name: {error}"]) from None
    return _quantized(config, model.with_config(remat=config.model.remat))


def _adapter(config: Config, model: Any, outputs: Sequence[str], key: Any, weights: bool) -> Adapter:
    """A new adapter where it belongs on the model's mesh, or its shapes."""
    found = sites(config, model.params)
    if outputs:  # The head is trained whole, whatever is selected.
        selected = [group for group in found if not _of_head(group.name)]
        found = jaxpeft.Sites((*selected, *jaxpeft.find(model.params, f"{HEAD}/.*")))
    spec = with_head(config.method, outputs)

    def make(key: jax.Array, base: Any) -> Adapter:
        return jaxpeft.init(key, spec, found, weights=base)

    try:
        shapes = jax.eval_shape(make, key, model.params)
        stored = jaxpeft.sharding.adapter(shapes, jaxpeft.sharding.of(model.params))
        if weights:
            return jax.jit(make, out_shardings=stored)(key, model.params)
        return jaxpeft.sharding.shapes(shapes, stored)
    except ValueError as error:  # hyper-parameters that are valid, but not for these weights
        raise ConfigError([f"method: {error}"]) from None


def _quantized(config: Config, model: Any) -> Any:
    kind, block, exclude = config.model.quantize, config.model.quantize_block, config.model.quantize_exclude
    if kind in (None, "gguf"):
        return model
    try:
        params = jaxpeft.quantize.quantize(model.params, kind, block=block, exclude=exclude)
        return dataclasses.replace(model, params=params)
    except ValueError as error:  # a block that does not divide a weight, or a name that none has
        raise ConfigError([f"model.quantize: {error} (model.quantize_block, model.quantize_exclude)"]) from None


def sites(config: Config, params: Any) -> jaxpeft.Sites:
    """The weights that the configuration adapts."""
    try:
        return jaxpeft.find(params, config.sites.select, exclude=config.sites.exclude, layers=config.sites.layers)
    except ValueError as error:
        raise ConfigError([f"sites: {error}"]) from None


def check_batch(config: Config, mesh: Mapping[str, int]) -> None:
    """Raises ConfigError unless the batch can be split over a mesh of these sizes."""
    parts = math.prod(mesh[axis] for axis in devices.BATCH)
    at_a_time = config.train.batch_size // config.train.accumulate
    if at_a_time % parts:
        raise ConfigError(
            [
                f"train.batch_size: {at_a_time} sequences at a time (batch_size / accumulate) cannot be split evenly "
                f"over {parts} devices (mesh data x fsdp); use a multiple of {parts * config.train.accumulate}"
            ]
        )


def assemble(config: Config, weights: bool = True) -> Job:
    """Everything a run needs; without `weights`, model and adapter are shapes only.

    Raises:
      ConfigError: a batch cannot be split over the devices.
      DataError, DownloadError, TemplateError: the data cannot be used.
    """
    check_batch(config, devices.sizes(config.mesh, jax.device_count()))
    kind = task.of(config)
    train_rows, held_out = kind.load(config)
    made = subject(config, weights, train_rows)
    _, examples, train_note = kind.encode(train_rows, made.template, config, made.outputs)
    held_out, held_out_examples, held_out_note = kind.encode(held_out, made.template, config, made.outputs)
    lengths = data.input_lengths(examples)
    batches = data.plan(lengths, config.data, config.train, math.lcm(kind.multiple, made.mesh.shape["sequence"]))
    optimizer = optim.optimizer(config.optimizer, len(batches), config.method)
    try:
        jax.eval_shape(optimizer.init, made.adapter.params)
        if config.optimizer.orthogonality:
            jax.eval_shape(jaxpeft.allocate.orthogonality, made.adapter)
    except ValueError as error:  # names, ranks or gates that this adapter does not have
        raise ConfigError([f"optimizer: {error}"]) from None
    shapes = ", ".join(f"{rows} x {length}" for rows, length in data.shapes(batches))
    return Job(
        **vars(made),
        config=config,
        examples=examples,
        lengths=lengths,
        batches=batches,
        held_out=held_out,
        held_out_examples=held_out_examples,
        notes=(
            f"training data: {train_note}",
            f"held-out data: {held_out_note}",
            f"{len(batches)} steps; batches of {shapes}; {data.padding(batches, lengths):.0%} padding",
        ),
    )
