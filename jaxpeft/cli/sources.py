"""What lies at a path, and how is it read?"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jaxpeft
from jaxpeft import checkpoint, models
from jaxpeft.adapter import Adapter
from jaxpeft.models.loading import TOKENIZER_FILES

Kind = Literal["adapter", "run", "peft", "model"]


@dataclass(frozen=True)
class Source:
    """A folder.

    Attributes:
        path: the folder.
        kind: a jaxpeft adapter (or checkpoints of one), a run folder, a PEFT adapter, or a Hugging Face model.
        adapter: the folder that `jaxpeft.load` reads; None for the last two kinds.
    """

    path: Path
    kind: Kind
    adapter: Path | None = None


def find(path: str | Path) -> Source:
    """What lies at a path.

    Raises:
        FileNotFoundError: nothing.
        ValueError: nothing that is known.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder")
    if (path / "adapter_config.json").exists():
        return Source(path, "peft")
    if (path / "config.json").exists():
        return Source(path, "model")
    if _has_steps(path):
        return Source(path, "adapter", path)
    for name in ("adapter", "checkpoints"):
        if _has_steps(path / name):
            return Source(path, "run", path / name)
    holds = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    hint = f"; the adapter is {path.parent}" if path.name.isdigit() and _has_steps(path.parent) else ""
    raise ValueError(
        f"{path} holds neither an adapter of jaxpeft (numbered steps), nor a run (adapter/), nor an adapter of PEFT "
        f"(adapter_config.json), nor a model (config.json); it holds {holds}{hint}"
    )


def find_adapter(path: str | Path) -> Source:
    """`find`, and a ValueError if a model lies there."""
    source = find(path)
    if source.kind == "model":
        raise ValueError(f"{source.path} is a model; expected an adapter")
    return source


def adapter(path: str | Path, params: Any = None) -> Adapter:
    """The adapter at a path.

    Args:
        path: of kind ``adapter``, ``run`` or ``peft``.
        params: the base parameters, compared with the fingerprint of the base; PEFT's files need them.

    Raises:
        ValueError: a model lies there; PEFT's files without `params`; an adapter of another base.
    """
    source = find_adapter(path)
    if source.adapter is not None:
        return jaxpeft.load(source.adapter, base=params)
    if params is None:
        base = peft_config(source.path).get("base_model_name_or_path")
        raise ValueError(f"{source.path} is an adapter of PEFT, which says nothing of shapes: pass --model ({base})")
    return jaxpeft.from_peft(source.path, params)


def fingerprint(path: str | Path) -> str | None:
    """The fingerprint of the base that an adapter was saved with; None if it was not noted."""
    source = find_adapter(path)
    return None if source.adapter is None else checkpoint.metadata(source.adapter)["base"]


def model(name: str) -> models.LanguageModel | models.EncoderModel:
    """A model, with its tokenizer if it has one."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return models.load(folder, tokenizer=any((folder / file).exists() for file in TOKENIZER_FILES))
    return models.pretrained(name)


def params(name: str | None) -> Any:
    """The parameters of a model; None without a name."""
    return None if name is None else model(name).params


def peft_config(folder: Path) -> dict[str, Any]:
    """``adapter_config.json`` of a PEFT adapter."""
    try:
        return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / 'adapter_config.json'}: damaged: {error}") from None


def _has_steps(folder: Path) -> bool:
    return folder.is_dir() and any(step.name.isdigit() and (step / "metadata").is_dir() for step in folder.iterdir())
