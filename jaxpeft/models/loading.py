"""How do a Hugging Face folder's weights become parameters, on one device or a mesh?"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from jaxpeft.models.config import FAMILIES, Config
from jaxpeft.models.encoder_config import ENCODER_FAMILIES, EncoderConfig
from jaxpeft.models.encoder_model import EncoderModel
from jaxpeft.models.language_model import LanguageModel
from jaxpeft.models.names import file_name, is_kernel, known_name, left_out
from jaxpeft.models.shapes import abstract, placed
from jaxpeft.sharding import Rules
from jaxpeft.sites import flatten, paths_and_leaves

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""A folder with one of them has a tokenizer."""
_DTYPES = ("float32", "float16", "bfloat16")


class ModelFileError(ValueError):
    """A file of a model's folder that is damaged, or not what its name says; the message names it."""


def load(
    folder: str | os.PathLike,
    *,
    dtype: str | None = None,
    param_dtype: str | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    tokenizer: bool = True,
    weights: bool = True,
) -> LanguageModel | EncoderModel:
    """Loads a model saved in the Hugging Face format: ``config.json``, safetensors files, the tokenizer's files.

    Each parameter is read from the memory-mapped files piece by piece into its final arrays, the layers stacked and
    the kernels transposed to (in, out): no second copy of the model exists, and every host reads its own shards only.

    Args:
      folder: ``model.safetensors``, or several files and ``model.safetensors.index.json``.
      dtype: of activations and products, "float32" or "bfloat16". Default: the files'.
      param_dtype: of the parameters. Default: `dtype`.
      mesh: where to put them. Default: the first device.
      rules: (regular expression, `PartitionSpec`) pairs tried in order on the "/"-joined path. Default: for axes named
        "fsdp" and "tensor", `DEFAULT_RULES`, where they divide a parameter.
      tokenizer: False leaves the tokenizer out.
      weights: False gives `jax.ShapeDtypeStruct` in place of the parameters, and reads no weights; needs `dtype`, if
        there are no weights' files to tell it.

    Returns:
      What the architecture in ``config.json`` is: a `LanguageModel`, or an `EncoderModel` of text or of images. An
      encoder's file may also hold heads and a pooler, which are left out.

    Raises:
      FileNotFoundError: the folder, its configuration, weights or tokenizer are missing.
      ModelFileError: a damaged file; tensors that are missing, unexpected or of another shape than the configuration
        says: all are listed at once.
      ValueError: an unsupported architecture; a layout that does not divide a parameter.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if dtype is None:
        dtype = _Tensors(folder).dtype()
    config = _config(folder, dtype=dtype, param_dtype=param_dtype or dtype)
    expected = {path: (file_name(path, config), leaf) for path, leaf in flatten(abstract(config)).items()}
    if weights:
        files = _Tensors(folder, config)
        files.check(expected, config)
        read = files.array
    else:
        read = _shape
    # Read before the weights: it is what is more often missing.
    reads_text = isinstance(config, Config) or not config.is_vision
    text = _read_tokenizer(folder) if tokenizer and reads_text else None

    shardings = _shardings(config, mesh, rules)
    params: dict[str, Any] = {}
    for path, (name, leaf) in expected.items():
        *parents, last = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = read(path, name, leaf, shardings[path])
    own = _json(folder / "config.json")
    if isinstance(config, EncoderConfig):
        return EncoderModel(config, params, text, source=str(folder), hf_config=own)
    generation = _json(folder / "generation_config.json")
    return LanguageModel(
        config,
        params,
        text,
        source=str(folder),
        eos_ids=_eos_ids(generation) or _eos_ids(own),
        hf_config=own,
        generation_config=generation,
    )


class _Tensors:
    """The tensors of a folder's safetensors files; headers are read at once, values on demand."""

    def __init__(self, folder: Path, config: Config | EncoderConfig | None = None):
        from safetensors import SafetensorError, safe_open

        index = folder / "model.safetensors.index.json"
        if index.exists():
            places = _json(index).get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
                raise ModelFileError(f"{index}: no weight_map; expected the names of the tensors and their files")
            names = sorted(set(places.values()))
        else:
            names = ["model.safetensors"]
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise FileNotFoundError(f"{folder}: weights missing: {', '.join(missing)}; only safetensors files are read")
        self.folder = folder
        self.slices = {}
        for name in names:
            try:
                file = safe_open(folder / name, framework="numpy")
            except (SafetensorError, OSError) as error:
                size = (folder / name).stat().st_size
                raise ModelFileError(f"{folder / name}: damaged or incomplete ({size} bytes): {error}") from error
            # A slice keeps its file open.
            for key in file.keys():  # noqa: SIM118, not a dict
                self.slices[key if config is None else known_name(key, config)] = file.get_slice(key)

    def dtype(self) -> str:
        """The dtype that most weights have."""
        names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        found = [names.get(tensor.get_dtype(), tensor.get_dtype()) for tensor in self.slices.values()]
        dtype = max(set(found), key=found.count)
        if dtype not in _DTYPES:
            raise ValueError(
                f"{self.folder}: weights of type {dtype} are not supported; supported: {', '.join(_DTYPES)}"
            )
        return dtype

    def check(self, expected: dict[str, tuple[str, jax.ShapeDtypeStruct]], config: Config | EncoderConfig) -> None:
        """Compares names and shapes with those the configuration asks for, before anything is read."""
        shapes = {}
        for path, (name, leaf) in expected.items():
            stacked = "{}" in name
            shape = _file_shape(leaf.shape[1:] if stacked else leaf.shape, path)
            for layer in range(config.num_hidden_layers if stacked else 1):
                shapes[name.format(layer)] = shape
        problems = [f"missing: {name} {shape}" for name, shape in shapes.items() if name not in self.slices]
        for name, tensor in self.slices.items():
            found = tuple(tensor.get_shape())
            if name not in shapes and not left_out(name, config):
                problems.append(f"unexpected: {name} {found}")
            elif name in shapes and found != shapes[name]:
                problems.append(f"shape: {name} is {found} in the file and {shapes[name]} by the configuration")
        if problems:
            listed = "\n  ".join(problems[:40]) + (f"\n  … {len(problems) - 40} more" if len(problems) > 40 else "")
            raise ModelFileError(f"{self.folder}: {len(problems)} tensors do not fit config.json:\n  {listed}")

    def array(self, path: str, name: str, leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.Array:
        """A parameter as laid out by `sharding`, every shard read and stacked on its own."""

        def read(layer: int, index: tuple[slice, ...]) -> np.ndarray:
            if is_kernel(path):
                return self.slices[name.format(layer)][index[::-1]].T
            return self.slices[name.format(layer)][index]

        def shard(index: Any) -> np.ndarray:
            shape = tuple(len(range(*part.indices(size))) for part, size in zip(index, leaf.shape, strict=True))
            out = np.empty(shape, leaf.dtype)
            if "{}" in name:
                for row, layer in enumerate(range(leaf.shape[0])[index[0]]):
                    out[row] = read(layer, index[1:])
            else:
                out[...] = read(0, index)
            return out

        return jax.make_array_from_callback(leaf.shape, sharding, shard)


def _shape(path: str, name: str, leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    del path, name
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _file_shape(shape: tuple[int, ...], path: str) -> tuple[int, ...]:
    return shape[::-1] if is_kernel(path) else shape


def _shardings(
    config: Config | EncoderConfig, mesh: Mesh | None, rules: Rules | None
) -> dict[str, jax.sharding.Sharding]:
    """{path: where the parameter goes}."""
    if mesh is None:
        here = SingleDeviceSharding(jnp.zeros(()).device)  # the default device, wherever a context sets it
        return dict.fromkeys(flatten(abstract(config)), here)
    return dict(paths_and_leaves(placed(config, mesh, rules)))


def _config(folder: Path, **numerics: str) -> Config | EncoderConfig:
    """The architecture that ``config.json`` describes; images are normalised as ``preprocessor_config.json`` says."""
    found = _read_config(folder)
    if found.model_type not in ENCODER_FAMILIES:
        if found.model_type not in FAMILIES:
            known = ", ".join([*FAMILIES, *ENCODER_FAMILIES])
            raise ValueError(f"model_type {found.model_type!r} is not supported; supported: {known}")
        return Config.from_hf(found, **numerics)
    config = EncoderConfig.from_hf(found, **numerics)
    if config.is_vision and (folder / "preprocessor_config.json").exists():
        read = _json(folder / "preprocessor_config.json")
        stated = {name: tuple(read[name]) for name in ("image_mean", "image_std") if name in read}
        config = dataclasses.replace(config, **stated)
    return config


def _read_config(folder: Path) -> Any:
    from transformers import AutoConfig

    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder}: no config.json; expected a model saved in the Hugging Face format")
    with _naming(folder, "config.json"):
        return AutoConfig.from_pretrained(folder, local_files_only=True)


@contextmanager
def _naming(folder: Path, name: str) -> Iterator[None]:
    """Names the file at fault where transformers, which raises a dozen unrelated types, cannot read some of a folder.

    Args:
      folder: the model's.
      name: the file that is meant to be read; one beside it that is no JSON is named instead.
    """
    try:
        yield
    except Exception as error:
        for path in (folder / name, *sorted(folder.glob("*.json"))):
            _json(path)
        why = " ".join(str(error).split())
        raise ModelFileError(f"{folder / name}: cannot be used ({type(error).__name__}: {why})") from error


def _json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; empty where there is no file."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = f"{error.strerror}" if isinstance(error, OSError) else f"{error}; it may be truncated"
        raise ModelFileError(f"{path}: expected a JSON object, cannot be read: {why}") from None
    if not isinstance(found, dict):
        raise ModelFileError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def _eos_ids(config: dict[str, Any]) -> tuple[int, ...]:
    """The tokens that end a text; chat models may have several, and say so for generation only."""
    ids = config.get("eos_token_id")
    return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)


def _read_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    names = [name for name in TOKENIZER_FILES if (folder / name).exists()]
    if not names:
        raise FileNotFoundError(f"{folder}: no tokenizer.json; pass tokenizer=False to load the weights alone")
    with _naming(folder, names[0]):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
