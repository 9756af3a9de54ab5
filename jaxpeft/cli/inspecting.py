"""What is an adapter, run or model folder made of?"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import jaxpeft
from jaxpeft import checkpoint, models, sharding
from jaxpeft.blocks import dequantized
from jaxpeft.checkpoint import Checkpoints
from jaxpeft.cli import sources
from jaxpeft.cli.sources import Source
from jaxpeft.fingerprint import fingerprint
from jaxpeft.models.shards import DTYPES
from jaxpeft.sites import flatten
from jaxpeft.spec import name_of
from jaxpeft.table import table


def inspect(path: str, *, arrays: bool = False) -> tuple[dict[str, Any], str]:
    """What lies at a path: as JSON, and as text.

    Args:
        path: an adapter, a run, an adapter of PEFT or a model.
        arrays: whether to list every array with its shape, dtype and norm; of a model that reads all weights, and gives
            its fingerprint.
    """
    source = sources.find(path)
    describe = {"adapter": _adapter, "run": _adapter, "peft": _peft, "model": _model}[source.kind]
    found, text = describe(source, arrays)
    found = {"path": str(source.path), "kind": source.kind, **found}
    if arrays:
        rows = [("array", "shape", "dtype", "norm")]
        rows += [
            (name, "x".join(map(str, row["shape"])), row["dtype"], f"{row['norm']:.6g}")
            for name, row in found["arrays"].items()
        ]
        text = [*text, "", *table(rows)]
    return found, "\n".join([f"{source.path}: {NAMES[source.kind]}", *text])


NAMES = {
    "adapter": "adapter of jaxpeft",
    "run": "training run",
    "peft": "adapter of Hugging Face PEFT",
    "model": "Hugging Face model",
}


def _adapter(source: Source, arrays: bool) -> tuple[dict[str, Any], list[str]]:
    folder = source.adapter
    assert folder is not None
    with Checkpoints(folder, read_only=True) as checkpoints:
        steps = checkpoints.steps()
    noted, adapter = checkpoint.metadata(folder), jaxpeft.load(folder)
    summary = jaxpeft.summary(adapter)
    found = {
        "adapter": str(folder),
        "steps": steps,
        "method": name_of(adapter.spec),
        "spec": noted["spec"],
        "parameters": summary.trained,
        "bytes": summary.stored_bytes,
        "sites": [
            {
                "group": row.name,
                "layers": row.group.layers,
                "in": row.group.in_dim,
                "out": row.group.out_dim,
                "layout": row.group.layout,
                "shape": list(row.group.shape),
                "trained": row.trained,
                "bytes": row.stored_bytes,
            }
            for row in summary.rows
            if row.group is not None
        ],
        "base": noted["base"],
        "extra": noted["extra"],
        "metrics": noted["metrics"],
    }
    text = [f"adapter  {folder}, steps {', '.join(map(str, steps))}", f"base     {noted['base'] or 'not noted'}"]
    text += [f"{name:8} {json.dumps(noted[name], ensure_ascii=False)}" for name in ("extra", "metrics") if noted[name]]
    text += ["", str(summary)]
    if (source.path / "summary.json").exists():
        results = json.loads((source.path / "summary.json").read_text(encoding="utf-8"))
        measured = {name: value for name, value in results.items() if name.endswith(("_before", "_after"))}
        found["measured"] = measured
        text += ["", *(f"{name:20} {value:.4f}" for name, value in measured.items())]
    if arrays:
        trees = {"params": adapter.params, "constants": adapter.constants}
        found["arrays"] = dict(_rows({f"{t}/{path}": leaf for t in trees for path, leaf in flatten(trees[t]).items()}))
    return found, text


def _peft(source: Source, arrays: bool) -> tuple[dict[str, Any], list[str]]:
    config = sources.peft_config(source.path)
    rows, file = {}, source.path / "adapter_model.safetensors"
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; only safetensors files are read")
    for name, tensor in _tensors(file, arrays):
        rows[name] = tensor
    parameters = sum(int(np.prod(row["shape"])) for row in rows.values())
    found = {
        "method": config.get("peft_type"),
        "spec": config,
        "parameters": parameters,
        "bytes": file.stat().st_size,
        "base": config.get("base_model_name_or_path"),
    }
    shown = ("peft_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "use_dora", "target_modules")
    text = [f"{name:24} {config[name]}" for name in shown if name in config]
    text.append(f"{len(rows)} tensors, {parameters:,} numbers; {found['bytes']:,} bytes")
    return found | ({"arrays": rows} if arrays else {}), text


def _model(source: Source, arrays: bool) -> tuple[dict[str, Any], list[str]]:
    model = models.load(source.path, tokenizer=False, weights=arrays)
    sites = jaxpeft.find(model.params)
    size = sum(file.stat().st_size for file in source.path.glob("*.safetensors"))
    found = {
        "architecture": model.hf_config["model_type"],
        "dtype": model.config.param_dtype,
        "parameters": model.num_params,
        "bytes": size,
        "sites": [
            {"group": g.name, "layers": g.layers, "in": g.in_dim, "out": g.out_dim, "shape": list(g.shape)}
            for g in sites
        ],
    }
    text = [
        f"{found['architecture']}, {model.num_params:,} parameters in {found['dtype']}, {size:,} bytes of weights",
        "",
        str(sites),
    ]
    if arrays:
        found["fingerprint"] = fingerprint(model.params)
        found["arrays"] = dict(_rows(flatten(model.params)))
        text.insert(1, f"fingerprint {found['fingerprint']}")
    return found, text


def _rows(leaves: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, leaf in leaves.items():
        yield path, _row(sharding.whole(dequantized(leaf)))


def _row(array: np.ndarray) -> dict[str, Any]:
    norm = float(np.linalg.norm(array.astype(np.float32).ravel()))
    return {"shape": list(array.shape), "dtype": str(array.dtype), "norm": norm}


def _tensors(file: Path, values: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """The tensors of a safetensors file; their values are read only where they are asked for."""
    from safetensors import SafetensorError, safe_open

    names = {short: name for name, short in DTYPES.items()}
    try:
        with safe_open(file, framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118, not a dict
                tensor = opened.get_slice(name)
                dtype = tensor.get_dtype()
                row = {"shape": list(tensor.get_shape()), "dtype": names.get(dtype, dtype)}
                yield name, _row(opened.get_tensor(name)) if values else row
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged or incomplete ({file.stat().st_size} bytes): {error}") from error
