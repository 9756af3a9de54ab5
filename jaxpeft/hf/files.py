"""How do the files of a PEFT adapter come to the disk and back: whole, strict, and never by pickle?"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxpeft import files

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
_PICKLED = "adapter_model.bin"


def check_free(folder: Path, overwrite: bool) -> None:
    """Raises FileExistsError unless a PEFT adapter can be written there."""
    files.check_free(folder, overwrite, "PEFT adapter", lambda path: (path / CONFIG).is_file())


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], card: str) -> None:
    """Writes the three files; the folder appears whole or not at all."""
    from safetensors.numpy import save_file

    with files.whole(folder, replace=True) as made:
        made.mkdir()
        # save_file writes the buffer as it lies, so it must lie in order.
        ordered = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        save_file(ordered, made / WEIGHTS, metadata={"format": "pt"})
        (made / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (made / CARD).write_text(card, encoding="utf-8")


def read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The config and the tensors, bfloat16 and float16 as float32.

    Raises:
        FileNotFoundError: the folder or one of the two files is missing.
        ValueError: the weights are pickled, or a file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not (folder / CONFIG).is_file():
        ours = any(step.name.isdigit() and (step / "metadata").is_dir() for step in folder.iterdir())
        hint = "; it is an adapter of jaxpeft, which jaxpeft.load reads" if ours else ""
        raise FileNotFoundError(f"{folder} has no {CONFIG}; expected what PEFT's save_pretrained writes{hint}")
    if not (folder / WEIGHTS).is_file():
        if (folder / _PICKLED).exists():
            raise ValueError(
                f"{folder / _PICKLED} is a pickle, which may run any code when it is read; load it in PEFT once and "
                f"save it with save_pretrained(…, safe_serialization=True), which writes {WEIGHTS}"
            )
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / CONFIG} is damaged: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG} holds a {type(config).__name__}; expected an object")
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        size = (folder / WEIGHTS).stat().st_size
        raise ValueError(f"{folder / WEIGHTS}: damaged or incomplete ({size} bytes): {error}") from None
    return config, {name: np.asarray(array, np.float32) for name, array in tensors.items()}
