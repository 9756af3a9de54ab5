"""How does a model, with or without an adapter merged in, become a Hugging Face folder?"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from jaxpeft import files, sharding
from jaxpeft.adapter import Adapter
from jaxpeft.blocks import Quantized, dequantized, is_quantized
from jaxpeft.layout import from_matrix
from jaxpeft.merge import changed, merged_matrix
from jaxpeft.models import shards
from jaxpeft.models.config import FAMILIES, Config
from jaxpeft.models.encoder_model import EncoderModel
from jaxpeft.models.language_model import LanguageModel, abstract
from jaxpeft.models.names import hf_name, is_kernel
from jaxpeft.models.shards import DTYPES, Tensor
from jaxpeft.sites import Group, flatten
from jaxpeft.spec import nearest
from jaxpeft.updates import Update


def save(
    folder: str | os.PathLike,
    model: LanguageModel | EncoderModel,
    adapter: Adapter | Sequence[Adapter] | None = None,
    *,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    dequantize: bool = False,
) -> None:
    """Writes a model in the Hugging Face format, for `jaxpeft.models.load`, `transformers`, vLLM and the like.

    The folder gets ``config.json``, ``generation_config.json`` if the model came with one, the tokenizer's files, and
    ``model.safetensors``, or several such files with an index. Kernels are (out, in) there, and every layer is a tensor
    of its own; tied embeddings are stored once. An adapter is merged weight by weight while the files are written:
    W + ΔW in float32, cast once. Beside the model and the adapter's updates, memory holds one tensor.

    Args:
      folder: appears whole or not at all.
      model: of arrays, on one device or a mesh that this process sees all of.
      adapter: what is merged in: an adapter of the model's parameters, or several, whose updates add up.
      dtype: of the tensors: "float32", "bfloat16" or "float16". Default: that of the model's parameters.
      max_shard_size: most bytes of one file, a number or for instance ``"500MB"``.
      overwrite: whether to replace a model that the folder holds.
      dequantize: whether weights in few bits may become the floats they stand for; the folder has no others.

    Raises:
      FileExistsError: the folder holds something, or with `overwrite` something that is no model.
      ValueError: an encoder; another dtype or size; shapes in place of parameters; parameters that are not the
        configuration's; weights in few bits without `dequantize`; an adapter of other weights, or one that cannot be
        merged; an architecture that `transformers` lacks; a value that the dtype cannot hold.

    Examples:
      >>> import tempfile, jax
      >>> from jaxpeft import models
      >>> config = models.Config(vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=2,
      ...                        num_attention_heads=4, num_key_value_heads=2)
      >>> lm = models.random(config, jax.random.key(0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     models.save(f"{folder}/tiny", lm)
      ...     again = models.load(f"{folder}/tiny", tokenizer=False)
      >>> again.config == config, bool((again.params["lm_head"]["kernel"] == lm.params["lm_head"]["kernel"]).all())
      (True, True)
    """
    if not isinstance(model, LanguageModel):
        raise ValueError(f"{model.source}: an encoder; only language models are written, jaxpeft.merge gives the tree")
    folder, size = Path(folder), shards.parse_size(max_shard_size)
    dtype = dtype or model.config.param_dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not written; {nearest(dtype, DTYPES)}")
    if jax.process_count() > 1:
        raise ValueError("a folder is written by one process; load the model and the adapter in a process of its own")
    check_free(folder, overwrite)
    leaves = flatten(model.params)
    _check_params(leaves, model.config, dequantize)
    config = _config(model, dtype)
    tensors = _tensors(leaves, changed(model.params, [] if adapter is None else adapter), dtype)
    with files.whole(folder, replace=True) as partial_folder:
        partial_folder.mkdir()
        _write_json(partial_folder / "config.json", config)
        if model.generation_config:
            _write_json(partial_folder / "generation_config.json", model.generation_config)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(partial_folder)
        shards.write(partial_folder, tensors, size)


def check_free(folder: Path, overwrite: bool) -> None:
    """Raises FileExistsError unless a model can be written there."""
    files.check_free(folder, overwrite, "model", lambda path: (path / "config.json").is_file())


def _check_params(leaves: Mapping[str, Any], config: Config, dequantize: bool) -> None:
    expected = {path: tuple(leaf.shape) for path, leaf in flatten(abstract(config)).items()}
    found = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    if problems := [
        f"{path}: found {found.get(path, 'nothing')}, expected {expected.get(path, 'nothing')}"
        for path in sorted(expected.keys() | found.keys())
        if expected.get(path) != found.get(path)
    ]:
        raise ValueError(f"{len(problems)} parameters are not the configuration's:\n  " + "\n  ".join(problems[:40]))
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(list(leaves.values()))):
        raise ValueError("the model has shapes in place of parameters; load it with weights=True")
    quantized = [path for path, leaf in leaves.items() if is_quantized(leaf)]
    if quantized and not dequantize:
        raise ValueError(
            f"{len(quantized)} weights are in few bits ({leaves[quantized[0]].kind}), such as {quantized[0]}; the "
            "folder would hold the floats they stand for: pass dequantize=True for that, or save the model in floats"
        )


def _config(model: LanguageModel, dtype: str) -> dict[str, Any]:
    """``config.json``: the folder's own that the model came from, if it still is this model's."""
    from transformers import CONFIG_MAPPING

    config, own = model.config, model.hf_config
    numerics = {"dtype": config.dtype, "param_dtype": config.param_dtype, "remat": config.remat}
    if own.get("model_type") in FAMILIES:
        kept = {name: value for name, value in own.items() if name != "torch_dtype"}
        if Config.from_hf(CONFIG_MAPPING[own["model_type"]].from_dict(own), **numerics) == config:
            return kept | {"dtype": dtype}
    made = config.to_hf()
    made.architectures = [f"{made.model_type.capitalize()}ForCausalLM"]
    made.dtype = dtype
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(made, name, getattr(model.tokenizer, name, None))
    return json.loads(made.to_json_string())


def _tensors(
    leaves: Mapping[str, Any], changes: Mapping[str, tuple[Group, tuple[Update, ...]]], dtype: str
) -> list[Tensor]:
    """All tensors, the layers one after the other; their shapes are worked out, so what cannot be merged shows."""
    found: list[tuple[int, Tensor]] = []
    for path, leaf in leaves.items():
        name, (group, updates) = hf_name(path), changes.get(path, (None, ()))
        layout = None if group is None else group.layout
        stacked = "{}" in name
        make = partial(_values, layout, dtype, is_kernel(path), stacked, leaf, updates)
        shape = jax.eval_shape(make, 0).shape
        for layer in range(leaf.shape[0] if stacked else 1):
            own = name.format(layer)
            found.append((layer if stacked else -1, Tensor(own, shape, dtype, partial(_read, own, dtype, make, layer))))
    return [tensor for _, tensor in sorted(found, key=lambda pair: pair[0])]


def _read(name: str, dtype: str, make: Any, layer: int) -> np.ndarray:
    values = sharding.whole(make(layer))
    if not np.isfinite(values).all():
        raise ValueError(
            f"{name}: {dtype} cannot hold it: not all of its values are finite; bfloat16 has a wider range"
        )
    return values


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _values(
    layout: str | None,
    dtype: str,
    kernel: bool,
    stacked: bool,
    leaf: Array | Quantized,
    updates: tuple[Update, ...],
    layer: Array,
) -> Array:
    """One tensor of the file: of a stacked parameter one layer, W or W + ΔW, a kernel as (out, in)."""
    if stacked:
        # One layer is a stack of one. An update's array of size 1 serves all layers.
        leaf, updates = jax.tree.map(
            lambda array: array if array.shape[0] == 1 else jax.lax.dynamic_slice_in_dim(array, layer, 1),
            (leaf, updates),
        )
    if layout is None:
        values = dequantized(leaf)
    else:
        values = from_matrix(merged_matrix(layout, leaf, updates), layout, leaf.shape)
    values = values.astype(dtype)
    values = values[0] if stacked else values
    return values.T if kernel else values


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
