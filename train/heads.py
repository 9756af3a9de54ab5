"""How does an encoder with a head learn from labelled texts and images, and how is it measured?"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxpeft
from jaxpeft import models
from jaxpeft.adapter import Adapter
from train import data, devices, images, labelled, scores
from train.config import Config, ConfigError
from train.data import Batch

if TYPE_CHECKING:
    from train.job import Job

ANSWERS = ("targets", "weights")
"""The arrays of a batch that predictions do not read."""


def prepare_text(config: Config, model: Any) -> models.EncoderModel:
    """The encoder of texts, pooled as configured.

    Raises:
      ConfigError: the model is none.
    """
    return _encoder(config, model, vision=False)


def prepare_images(config: Config, model: Any) -> models.EncoderModel:
    """The encoder of images, pooled as configured.

    Raises:
      ConfigError: the model is none, or cannot read images of the configured size.
    """
    encoder = _encoder(config, model, vision=True)
    size, patch = image_size(config, encoder), encoder.config.patch_size
    if size % patch:
        near = max(patch, round(size / patch) * patch)
        raise ConfigError(
            [f"task.image_size: {size} is no multiple of the model's patches of {patch}; nearest: {near}"]
        )
    if encoder.config.num_channels != 3:
        raise ConfigError([f"model.name: reads images of {encoder.config.num_channels} channels, expected 3"])
    return encoder


def text_reader(config: Config, model: models.EncoderModel) -> labelled.Reader:
    """The model's tokenizer."""
    del config
    shape = model.config
    return labelled.Reader(model.tokenizer, shape.vocab_size, shape.positions, typed=shape.type_vocab_size > 1)


def image_reader(config: Config, model: models.EncoderModel) -> images.Reader:
    """The model's resolution and normalisation."""
    return images.Reader(
        image_size(config, model), model.config.image_mean, model.config.image_std, longest_image(config, model)
    )


def image_size(config: Config, model: models.EncoderModel) -> int:
    """Pixels a side."""
    return config.task.image_size or model.config.image_size


def longest_text(config: Config, model: models.EncoderModel) -> int:
    """Most tokens of a row."""
    return min(config.data.max_length, model.config.positions)


def longest_image(config: Config, model: models.EncoderModel) -> int:
    """Tokens of every image: its patches, and one."""
    return (image_size(config, model) // model.config.patch_size) ** 2 + 1


def text_shapes(config: Config, model: models.EncoderModel, rows: int, length: int) -> dict[str, Any]:
    """{name: (shape, dtype)} of a batch."""
    shape = (rows, min(length, model.config.positions))
    arrays = dict.fromkeys(("tokens", "mask", "token_types"), (shape, jnp.int32))
    return arrays | _target_shapes(config, rows)


def image_shapes(config: Config, model: models.EncoderModel, rows: int, length: int) -> dict[str, Any]:
    """{name: (shape, dtype)} of a batch."""
    size = image_size(config, model)
    return {"images": ((rows, size, size, 3), jnp.float32)} | _target_shapes(config, rows)


def losses(config: Config, model: models.EncoderModel) -> Callable:
    """The loss of every row, (B,): cross-entropy in nats, or the squared error of a regression."""
    return model.squared_errors if config.task.kind == "regression" else model.class_losses


def outputs(config: Config, train: Sequence[Any] | None) -> tuple[str, ...]:
    """The names of what the head says: the classes, or the score."""
    return ("score",) if config.task.kind == "regression" else labelled.labels(config, train)


def collate_text(
    batch: Batch, examples: Sequence[labelled.Example], config: Config, reader: Any, rows: Sequence[int] | None = None
) -> dict[str, np.ndarray]:
    """The arrays of a batch, or of some of its rows.

    Returns:
      `tokens`, `mask`, `token_types` (rows, length) int32; `targets` (rows,) int32 or, of a regression, float32;
      `weights` (rows,) float32, 0 for a row that fills up the batch.
    """
    chosen = _rows(batch, rows)
    # Lengths are rounded up, but not beyond what the model has positions for.
    shape = (len(chosen), min(batch.length, reader.positions))
    arrays = {name: np.zeros(shape, np.int32) for name in ("tokens", "mask", "token_types")}
    for i, row in enumerate(chosen):
        for number in row:
            example = examples[number]
            arrays["tokens"][i, : len(example.tokens)] = example.tokens
            arrays["mask"][i, : len(example.tokens)] = 1
            arrays["token_types"][i, : len(example.tokens)] = example.types
    return arrays | _targets(chosen, examples, config)


def collate_images(
    batch: Batch, examples: Sequence[images.Example], config: Config, reader: Any, rows: Sequence[int] | None = None
) -> dict[str, np.ndarray]:
    """As `collate_text`, with `images` (rows, size, size, 3) float32."""
    chosen = _rows(batch, rows)
    pixels = np.zeros((len(chosen), reader.size, reader.size, 3), np.float32)
    for i, row in enumerate(chosen):
        for number in row:
            pixels[i] = reader.normalised(examples[number].image)
    return {"images": pixels} | _targets(chosen, examples, config)


class Evaluator:
    """Measures adapters on a job's held-out rows; compiled once a shape, however often it is used."""

    def __init__(self, job: "Job"):
        self.job = job
        self.batch_size = devices.whole_batches(job.config.evaluate.batch_size, job.mesh)
        forward = jaxpeft.adapt(job.model.predict, shardings=job.shardings)

        def predict(base: Any, adapter: Adapter, inputs: dict[str, jax.Array]) -> jax.Array:
            return forward(base, adapter, **inputs)

        self.predict = devices.Compiled(predict, job.mesh, out_shardings=devices.everywhere(job.mesh))

    def __call__(self, adapter: Adapter) -> dict[str, float]:
        """`eval_loss`, and the scores of `train.scores`."""
        predictions, targets = self.predictions(adapter)
        measured = {"eval_loss": self._loss(predictions, targets)}
        if self.job.config.task.kind == "regression":
            return measured | scores.regression(predictions[:, 0], targets)
        return measured | scores.classification(predictions, targets)

    def loss(self, adapter: Adapter, rows: int | None = None) -> float:
        """Mean loss of the first `rows` held-out rows."""
        return self._loss(*self.predictions(adapter, rows))

    def predictions(self, adapter: Adapter, rows: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """What the head says of the first `rows` held-out rows, (n, outputs) float32, and what it should, (n,)."""
        job = self.job
        examples = job.held_out_examples[:rows]
        found = np.zeros((len(examples), len(job.outputs)), np.float32)
        lengths = data.input_lengths(examples)
        for batch in data.fixed_batches(lengths, self.batch_size, job.config.data.buckets):
            arrays = job.task.collate(batch, examples, job.config, job.template)
            inputs = {name: array for name, array in arrays.items() if name not in ANSWERS}
            # Every process holds all rows, and gets all predictions.
            placed = dict(zip(inputs, devices.put(list(inputs.values()), job.mesh), strict=True))
            predicted = np.asarray(self.predict(job.base, adapter, placed))
            for i, row in enumerate(batch.sequences):
                for number in row:
                    found[number] = predicted[i]
        return found, np.array([example.target for example in examples])

    def _loss(self, predictions: np.ndarray, targets: np.ndarray) -> float:
        values = predictions.astype(np.float64)
        if self.job.config.task.kind == "regression":
            return float(np.mean((values[:, 0] - targets) ** 2))
        values -= values.max(1, keepdims=True)
        chosen = values[np.arange(len(values)), targets.astype(int)]
        return float(np.mean(np.log(np.exp(values).sum(1)) - chosen))


def _encoder(config: Config, model: Any, vision: bool) -> models.EncoderModel:
    wanted = "images" if vision else "text"
    found = "is a language model"
    if isinstance(model, models.EncoderModel):
        found = f"is an encoder of {'images' if model.config.is_vision else 'text'}"
    if not isinstance(model, models.EncoderModel) or model.config.is_vision != vision:
        raise ConfigError(
            [f"model.name: {config.model.name} {found}, but task.kind {config.task.kind} needs an encoder of {wanted}"]
        )
    return model.with_config(pooling=config.task.pooling) if config.task.pooling else model


def _rows(batch: Batch, rows: Sequence[int] | None) -> list[tuple[int, ...]]:
    return list(batch.sequences) if rows is None else [batch.sequences[row] for row in rows]


def _targets(chosen: Sequence[tuple[int, ...]], examples: Sequence[Any], config: Config) -> dict[str, np.ndarray]:
    kind = np.float32 if config.task.kind == "regression" else np.int32
    targets = [examples[row[0]].target if row else 0 for row in chosen]
    return {"targets": np.array(targets, kind), "weights": np.array([float(bool(row)) for row in chosen], np.float32)}


def _target_shapes(config: Config, rows: int) -> dict[str, Any]:
    kind = jnp.float32 if config.task.kind == "regression" else jnp.int32
    return {"targets": ((rows,), kind), "weights": ((rows,), jnp.float32)}
