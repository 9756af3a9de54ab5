"""What a configuration stands for: the model, the adapter and the data, ready to be trained or measured."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import jaxpeft
from jaxpeft import models
from jaxpeft.adapter import Adapter
from train import data, devices, optim, rows
from train.config import Config, ConfigError
from train.rows import Row
from train.template import Example, Template


@dataclass(frozen=True)
class Subject:
    """A base model and an adapter for it.

    Attributes:
      mesh: all devices.
      model: the language model; its functions take the parameters, so `base` is held here once.
      base: its frozen parameters, loaded straight to their shards.
      adapter: new, so the adapted model is the base model.
      key: random key of the dropout.
      template: turns conversations into tokens; None where all is shapes.
    """

    mesh: Mesh
    model: models.LanguageModel
    base: Any
    adapter: Adapter
    key: jax.Array
    template: Template | None = None

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
    examples: Sequence[Example]
    lengths: np.ndarray
    batches: Sequence[data.Batch]
    held_out: Sequence[Row]
    held_out_examples: Sequence[Example]
    notes: Sequence[str]

    @property
    def packed(self) -> bool:
        """Whether sequences hold several rows."""
        return self.config.data.batching == "pack"


def subject(config: Config, weights: bool = True) -> Subject:
    """Loads the model and makes the adapter; without `weights`, both are shapes only."""
    mesh = devices.mesh(config.mesh)
    model = _pretrained(config, mesh, weights)
    # Made on the mesh, because a random key cannot be moved to other processes.
    keys = jax.jit(
        lambda: tuple(jax.random.split(jax.random.key(config.train.seed))), out_shardings=devices.everywhere(mesh)
    )
    adapter_key, dropout_key = keys()
    adapter = _adapter(config, model, adapter_key, weights)
    return Subject(
        mesh,
        model,
        model.params,
        adapter,
        dropout_key,
        Template(model.tokenizer, config.data.template, embedded=model.config.vocab_size),
    )


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
        model = _pretrained(config, mesh, weights=False)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=devices.everywhere(mesh))
    return Subject(mesh, model, model.params, _adapter(config, model, key, weights=False), key)


def _pretrained(config: Config, mesh: Mesh, weights: bool) -> models.LanguageModel:
    name, dtype = config.model.name, config.model.dtype
    try:
        kept = config.model.quantize == "gguf"
        model = models.pretrained(name, dtype=dtype, mesh=mesh, weights=weights, keep_blocks=kept)
    except ValueError as error:  # no such model, or files that are not one
        raise ConfigError([f"model.name: {error}"]) from None
    return _quantized(config, model.with_config(remat=config.model.remat))


def _adapter(config: Config, model: models.LanguageModel, key: Any, weights: bool) -> Adapter:
    """A new adapter where it belongs on the model's mesh, or its shapes."""
    found = sites(config, model.params)

    def make(key: jax.Array, base: Any) -> Adapter:
        return jaxpeft.init(key, config.method, found, weights=base)

    try:
        shapes = jax.eval_shape(make, key, model.params)
        stored = jaxpeft.sharding.adapter(shapes, jaxpeft.sharding.of(model.params))
        if weights:
            return jax.jit(make, out_shardings=stored)(key, model.params)
        return jaxpeft.sharding.shapes(shapes, stored)
    except ValueError as error:  # hyper-parameters that are valid, but not for these weights
        raise ConfigError([f"method: {error}"]) from None


def _quantized(config: Config, model: models.LanguageModel) -> models.LanguageModel:
    if config.model.quantize in (None, "gguf"):
        return model
    try:
        params = jaxpeft.quantize.quantize(model.params, config.model.quantize)
        return dataclasses.replace(model, params=params)
    except ValueError as error:  # a block that does not divide a weight
        raise ConfigError([f"model.quantize: {error}"]) from None


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
    train_rows, held_out = rows.load(config.data)
    made = subject(config, weights)
    _, examples, train_note = data.encode(train_rows, made.template, config.data)
    held_out, held_out_examples, held_out_note = data.encode(held_out, made.template, config.data)
    lengths = data.input_lengths(examples)
    batches = data.plan(lengths, config.data, config.train, math.lcm(data.MULTIPLE, made.mesh.shape["sequence"]))
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
