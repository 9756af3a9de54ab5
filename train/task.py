"""What is learned? A table of the kinds of task and what each is made of; nothing else asks which it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jaxpeft import models
from train import data, evaluate, heads, images, labelled, rows
from train.config import Config, ConfigError
from train.template import Template


@dataclass(frozen=True)
class Task:
    """One kind of task, as functions.

    Attributes:
      load: (config) -> training rows and held-out rows, before anything large is loaded.
      outputs: (config, training rows or None) -> names of the outputs of the head that is trained; empty for no head.
      model: (config, model) -> the model, set up for the task; an error if it is none for it.
      reader: (config, model) -> what turns rows into examples; its `fingerprint` tells it from others.
      encode: (rows, reader, config, outputs) -> rows kept, their examples, and a sentence on what was not. An example
        has `positions`, how long it is, and `content`, for a checksum.
      collate: (batch, examples, config, reader, rows=None) -> {name: array}, `weights` among them.
      shapes: (config, model, rows, length) -> {name: (shape, dtype)} of what `collate` returns.
      longest: (config, model) -> the most positions an example may have.
      losses: (config, model) -> a function (params, **arrays without weights) -> losses of the shape of `weights`.
      evaluator: (job) -> what measures adapters: called, and by its `loss`.
      multiple: lengths of batches are rounded up to a multiple of this.
    """

    load: Callable[[Config], tuple[list, list]]
    outputs: Callable[[Config, Any], tuple[str, ...]]
    model: Callable[[Config, Any], Any]
    reader: Callable[[Config, Any], Any]
    encode: Callable[..., tuple[list, list, str]]
    collate: Callable[..., dict[str, Any]]
    shapes: Callable[[Config, Any, int, int], dict[str, Any]]
    longest: Callable[[Config, Any], int]
    losses: Callable[[Config, Any], Callable]
    evaluator: Callable[[Any], Any]
    multiple: int = data.MULTIPLE


def of(config: Config) -> Task:
    """The task that a configuration asks for."""
    return TASKS[config.task.kind]


def _language_model(config: Config, model: Any) -> models.LanguageModel:
    if not isinstance(model, models.LanguageModel):
        kinds = "image-classification" if model.config.is_vision else "classification or regression"
        raise ConfigError([f"model.name: {config.model.name} is an encoder; set task.kind to {kinds}"])
    return model


def _packed(config: Config) -> bool:
    return config.data.batching == "pack"


def _text_shapes(config: Config, model: Any, rows: int, length: int) -> dict[str, Any]:
    packed = ("positions", "segment_ids") if _packed(config) else ()
    kinds = dict.fromkeys(("tokens", "targets", *packed), jnp.int32) | {"weights": jnp.float32}
    return {name: ((rows, length), kind) for name, kind in kinds.items()}


GENERATION = Task(
    load=lambda config: rows.load(config.data),
    outputs=lambda config, train: (),
    model=_language_model,
    reader=lambda config, model: Template(model.tokenizer, config.data.template, embedded=model.config.vocab_size),
    encode=lambda found, reader, config, outputs: data.encode(found, reader, config.data),
    collate=lambda batch, examples, config, reader, rows=None: data.collate(batch, examples, _packed(config), rows),
    shapes=_text_shapes,
    longest=lambda config, model: config.data.max_length - 1,
    losses=lambda config, model: model.token_losses,
    evaluator=evaluate.Evaluator,
)
LABELLED_TEXT = Task(
    load=labelled.load,
    outputs=heads.outputs,
    model=heads.prepare_text,
    reader=heads.text_reader,
    encode=labelled.encode,
    collate=heads.collate_text,
    shapes=heads.text_shapes,
    longest=heads.longest_text,
    losses=heads.losses,
    evaluator=heads.Evaluator,
)
IMAGES = Task(
    load=images.load,
    outputs=heads.outputs,
    model=heads.prepare_images,
    reader=heads.image_reader,
    encode=images.encode,
    collate=heads.collate_images,
    shapes=heads.image_shapes,
    longest=heads.longest_image,
    losses=heads.losses,
    evaluator=heads.Evaluator,
    multiple=1,
)
TASKS = {
    "generation": GENERATION,
    "classification": LABELLED_TEXT,
    "regression": LABELLED_TEXT,
    "image-classification": IMAGES,
}
"""{`task.kind` of a configuration: task}."""
