"""How do models and adapters become others? merge, convert, combine; from files to files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import jaxpeft
from jaxpeft import models
from jaxpeft.adapter import Adapter
from jaxpeft.cli import sources
from jaxpeft.models.saving import check_free
from jaxpeft.spec import name_of

DRAWING = ("dare_linear", "dare_ties", "lego")
"""Ways of `jaxpeft.combine` that need a random key."""

Result = tuple[dict[str, Any], str]


def merge(
    model: str,
    adapter: str,
    out: str,
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> Result:
    """Writes a model with an adapter merged in; see `jaxpeft.models.save`."""
    check_free(Path(out), overwrite)
    sources.find_adapter(adapter)  # what is no adapter shows before the model is read
    base = sources.model(model)
    own = sources.adapter(adapter, base.params)
    models.save(out, base, own, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite)
    size = sum(file.stat().st_size for file in Path(out).glob("*.safetensors"))
    found = {"folder": out, "files": sorted(file.name for file in Path(out).iterdir()), "bytes": size}
    return found, f"{out}: {len(found['files'])} files, {size:,} bytes of weights"


def convert(
    adapter: str,
    out: str,
    to: str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    model: str | None = None,
    base_model: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Result:
    """Writes an adapter as PEFT's files, as jaxpeft's own, or as plain LoRA in jaxpeft's own."""
    if to == "jaxpeft" and (rank is not None or energy is not None):
        raise ValueError("--rank and --energy cut to LoRA; use them with --to lora or --to peft")
    if to != "peft" and (dtype is not None or base_model is not None):
        raise ValueError(f"--dtype and --base-model are of PEFT's files; they have no effect on --to {to}")
    if to == "peft" and not (base_model or model):
        raise ValueError("PEFT's files name their base: pass --model, or --base-model for the name alone")
    sources.find_adapter(adapter)
    params = sources.params(model)
    own = sources.adapter(adapter, params)
    if to == "peft":
        report = jaxpeft.to_peft(
            out,
            own,
            base_model=str(base_model or model),
            base=params,
            rank=rank,
            energy=energy,
            dtype=dtype,
            overwrite=overwrite,
        )
        return {"folder": out, "to": to, "report": str(report)}, f"{out}: {report}"
    said = ""
    if to == "lora":
        own, report = jaxpeft.to_lora(own, rank=rank, energy=energy, base=params)
        said = str(report)
    jaxpeft.save(out, own, base=params, base_fingerprint=sources.fingerprint(adapter), overwrite=overwrite)
    return {"folder": out, "to": to, **_described(own, said)}, _text(out, own, said)


def combine(
    out: str,
    adapters: Sequence[str],
    weights: Sequence[float] | None = None,
    method: Any = "linear",
    *,
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    majority_sign: Any = "total",
    seed: int = 0,
    model: str | None = None,
    overwrite: bool = False,
) -> Result:
    """Writes several adapters as one; see `jaxpeft.combine`.

    Raises:
        ValueError: they were trained on different bases.
    """
    bases = {path: base for path in adapters if (base := sources.fingerprint(path)) is not None}
    if len(set(bases.values())) > 1:
        listed = ", ".join(f"{path}: {base}" for path, base in bases.items())
        raise ValueError(f"the adapters are of different bases, by their fingerprints: {listed}")
    params = sources.params(model)
    made, report = jaxpeft.combine(
        [sources.adapter(path, params) for path in adapters],
        weights,
        how=method,
        rank=rank,
        energy=energy,
        density=density,
        majority_sign=majority_sign,
        key=jax.random.key(seed) if method in DRAWING else None,
        base=params,
    )
    jaxpeft.save(out, made, base=params, base_fingerprint=next(iter(bases.values()), None), overwrite=overwrite)
    return {"folder": out, **_described(made, str(report))}, _text(out, made, str(report))


def _described(adapter: Adapter, report: str) -> dict[str, Any]:
    return {"spec": adapter.spec.to_dict(), "parameters": jaxpeft.count(adapter), "report": report}


def _text(out: str, adapter: Adapter, report: str) -> str:
    count = f"{jaxpeft.count(adapter):,} trained parameters"
    return "\n".join(
        [f"{out}: {name_of(adapter.spec)}, {count}", f"{name_of(adapter.spec)}.{adapter.spec}", report]
    ).rstrip()
