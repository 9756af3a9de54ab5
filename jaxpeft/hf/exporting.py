"""How does an adapter become a PEFT adapter: as itself, as the same LoRA, or as the nearest one?"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpeft import convert
from jaxpeft.adapter import Adapter, check_base
from jaxpeft.hf import card, files, native, settings, tensors
from jaxpeft.hf.names import Modules, Names, is_conv1d, is_embedding
from jaxpeft.hf.tensors import PREFIX
from jaxpeft.methods import full
from jaxpeft.sites import Group, Sites, flatten
from jaxpeft.updates import Decomposed, Update

_PEFT = "0.21.0"
"""The version whose files these are."""


@dataclass(frozen=True)
class Report:
    """What `to_peft` wrote.

    Attributes:
        peft_type: PEFT's name of the method, ``LORA`` for all that PEFT does not have.
        how: ``native``, PEFT's own form of the method; ``lossless``, the same update as a LoRA; ``truncated``, the
            nearest LoRA of the rank or energy that was asked for.
        modules: adapted torch modules.
        whole: torch parameters that are written whole: ``modules_to_save`` and biases.
        parameters: numbers in the file.
        errors: {path: ‖ΔW - written‖ / ‖ΔW‖}; empty where nothing was cut off.
    """

    peft_type: str
    how: str
    modules: tuple[str, ...]
    whole: tuple[str, ...]
    parameters: int
    errors: dict[str, float]

    @property
    def error(self) -> float:
        """The largest of the errors."""
        return max(self.errors.values(), default=0.0)

    def __str__(self) -> str:
        lossy = f", relative error up to {self.error:.2%}" if self.errors else ""
        whole = f" and {len(self.whole)} parameters whole" if self.whole else ""
        return f"{self.peft_type} ({self.how}{lossy}): {len(self.modules)} modules{whole}, {self.parameters:,} numbers"


def to_peft(
    folder: str | os.PathLike,
    adapter: Adapter,
    *,
    base_model: str,
    base: Any = None,
    names: Names | None = None,
    rank: int | None = None,
    energy: float | None = None,
    dtype: str | None = None,
    task_type: str | None = "CAUSAL_LM",
    overwrite: bool = False,
) -> Report:
    """Writes an adapter as Hugging Face PEFT does, for ``peft.PeftModel.from_pretrained(model, folder)``.

    A method that PEFT has is written in PEFT's own form. Every other one that is a product of two factors is written
    as the LoRA it is, losslessly; the rest as the nearest LoRA, if `rank` or `energy` says how near. Weights trained
    whole become ``modules_to_save`` or ``bias``.

    Args:
        folder: where ``adapter_config.json``, ``adapter_model.safetensors`` and a model card ``README.md`` go; they
            appear whole or not at all.
        adapter: the adapter.
        base_model: hub id or folder of the torch model, recorded as ``base_model_name_or_path``.
        base: the base parameters; needed by weights trained whole, by updates that depend on the weight they change,
            and by adapters that are DoRA in part; with them ``target_modules`` are short names.
        names: torch's module for a path of ours, a function or a mapping, such as
            ``{"blocks/up/kernel": "transformer.h.{}.mlp.c_fc"}``, with ``{}`` for each axis that stacks layers. What it
            leaves out (None) is named by default: the decoders of `jaxpeft.models` as in Hugging Face files, other
            trees by their path without the leaf's own name, the number behind ``layers``, ``blocks`` or ``h``.
        rank: write the nearest LoRA of at most this rank, whatever the method.
        energy: write the nearest LoRA that keeps this share of every ‖ΔW‖².
        dtype: of the tensors, ``float32`` (the default), ``bfloat16`` or ``float16``.
        task_type: PEFT's.
        overwrite: whether to replace an adapter that the folder holds.

    Returns:
        What was written, and what was lost.

    Raises:
        FileExistsError: the folder holds something already.
        ValueError: the adapter has no ΔW or is of full rank, and neither `rank` nor `energy` is given; the base is
            needed; PEFT cannot say what is trained; a name is missing.

    Examples:
        >>> import tempfile, jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import mos
        >>> params = {"layers": [{"q_proj": {"kernel": jnp.ones((64, 32))}} for _ in range(4)]}
        >>> spec = mos.Spec(rank=4, equivalent_rank=2, private_rank=1)
        >>> adapter = jaxpeft.init(jax.random.key(0), spec, jaxpeft.find(params))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(jaxpeft.to_peft(folder, adapter, base_model="some/model"))
        ...     jaxpeft.from_peft(folder, params).spec.rank
        LORA (lossless): 4 modules, 1,536 numbers
        4
    """
    folder = Path(folder).absolute()
    files.check_free(folder, overwrite)
    convert.check_size(rank, energy)
    kind = _dtype(dtype)
    leaves = None if base is None else flatten(base)
    if leaves is not None:
        check_base(adapter.sites, leaves)
    modules = Modules(leaves or [path for group in adapter.sites for path in group.paths], names)
    _check_tied(adapter.sites, modules, leaves)
    if rank is None and energy is None and not _split(adapter)[0]:
        raise ValueError(
            "PEFT needs at least one adapted module, and here every weight is trained whole; pass rank= or energy= to "
            "write the nearest LoRA, or save the merged model (jaxpeft.merge)"
        )
    written, method, how, errors = _form(adapter, modules, base, rank, energy)
    adapted, whole = _split(written)
    fields = settings.fields(written, adapted, method, modules)
    assert fields is not None  # or _form had not chosen it
    if fields.get("use_dora") and (embeddings := [group.name for group in adapted if is_embedding(group.paths[0])]):
        raise ValueError(f"{embeddings[0]}: DoRA on an embedding is not written; pass rank= for the nearest LoRA")
    layouts = {re.escape(path): group.layout for group in adapter.sites for path in group.paths}
    places = {} if base is None else modules.of_tree(base, layouts)
    targets = [name.rpartition(".")[0] for group in adapted for name in modules.of_group(group)]
    arrays = tensors.shared(written, adapted, method)
    arrays |= tensors.adapted_modules(written, adapted, method, modules, base)
    saved, bias, replaced = tensors.whole(written, whole, method, modules, places, base, targets)
    known = [name.rpartition(".")[0] for name in places]
    listed = {key: settings.short(fields[key], known) for key in method.listed}
    apart = [set(fields[key]) for key in method.listed]
    others = [name for name in targets if not any(name in names for names in apart)]
    config: dict[str, Any] = {
        "peft_type": method.peft_type,
        "peft_version": _PEFT,
        "task_type": task_type,
        "base_model_name_or_path": str(base_model),
        "inference_mode": True,
        "target_modules": [*settings.short(others, known), *(name for names in listed.values() for name in names)],
        "modules_to_save": saved or None,
        **fields,
        **listed,
    }
    if bias != "none":
        config["bias"] = bias
    if any(is_conv1d(group.paths[0], group.layout) for group in adapted):
        config["fan_in_fan_out"] = True
    arrays = {name: _cast(name, np.asarray(array), kind) for name, array in (arrays | replaced).items()}
    report = Report(
        method.peft_type,
        how,
        tuple(targets),
        tuple(sorted(name.removeprefix(PREFIX) for name in replaced)),
        sum(array.size for array in arrays.values()),
        errors,
    )
    files.write(folder, config, arrays, card.text(adapter, report, config))
    return report


def _dtype(name: str | None) -> Any:
    known = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
    if (name or "float32") not in known:
        raise ValueError(f"dtype={name!r}: expected one of {', '.join(known)}")
    return np.dtype(known[name or "float32"])


def _cast(name: str, array: np.ndarray, kind: np.dtype) -> np.ndarray:
    """An array in the file's dtype; ValueError if it has or gets values that are no numbers."""
    largest = np.abs(array).max()
    if not np.isfinite(largest) or largest > float(jnp.finfo(kind).max):
        raise ValueError(
            f"{name} has values up to {largest}, which {kind} cannot hold; pass another dtype=, or check it"
        )
    return array.astype(kind)


def _check_tied(sites: Sites, modules: Modules, leaves: Mapping[str, Any] | None) -> None:
    """Refuses the embedding of a decoder whose head is that embedding: torch's head would not see the change."""
    if not modules.decoder or not any(path == "embed/embedding" for group in sites for path in group.paths):
        return
    if leaves is None:
        raise ValueError("embed/embedding is adapted: pass base=, which tells whether the head is tied to it")
    if "lm_head/kernel" not in leaves:
        raise ValueError(
            "embed/embedding is adapted and the head is tied to it; PEFT would change the embedding alone. Save the "
            "merged model (jaxpeft.merge)"
        )


def _split(adapter: Adapter) -> tuple[list[Group], list[Group]]:
    """The adapted groups, and those that are trained whole."""
    whole = [group for group in adapter.sites if isinstance(adapter.spec.part(group), full.Spec)]
    return [group for group in adapter.sites if group not in whole], whole


def _form(
    adapter: Adapter, modules: Modules, base: Any, rank: int | None, energy: float | None
) -> tuple[Adapter, native.Format, str, dict[str, float]]:
    """The adapter in the form that it is written in, that form, how it came to it, and what it lost."""
    adapted, _ = _split(adapter)
    if rank is None and energy is None and adapted:
        method = _native(adapter, adapted, modules, base)
        if method is not None:
            return adapter, method, "native", {}
        updates = adapter.updates()
        if all(_is_lora(updates[group.name], group) for group in adapted):
            return adapter, native.LORA, "lossless", {}
    plain, conversion = convert.to_lora(adapter, rank=rank, energy=energy, base=base)
    how = "lossless" if conversion.exact else "truncated"
    return plain, native.LORA, how, {} if conversion.exact else conversion.error


def _is_lora(update: Update, group: Group) -> bool:
    """Whether an update is a DoRA as it is, or a LoRA of no more rank than the weight has."""
    factors = settings.factors_of(update) if "i" in group.layout else None
    if factors is None:
        return False
    return isinstance(update, Decomposed) or factors.a.shape[1] <= min(group.in_dim, group.out_dim)


def _native(adapter: Adapter, adapted: Sequence[Group], modules: Modules, base: Any) -> native.Format | None:
    """PEFT's form of the method that all adapted groups have; None if it has none for them."""
    parts = [adapter.spec.part(group) for group in adapted]
    methods = {native.format_of(part) for part in parts}
    method = methods.pop() if len(methods) == 1 else None
    if method is None or any(part.start != "method" for part in parts):
        return None
    if method is native.LORA:
        return method if len({part.dora for part in parts}) == 1 else None
    conv1d = any(is_conv1d(group.paths[0], group.layout) for group in adapted)
    scales = np.concatenate([np.asarray(adapter.constants[group.name]["scale"]) for group in adapted])
    unsaid = (
        any(part.dora for part in parts),
        method.shared and len({id(part) for part in parts}) > 1,
        any(is_embedding(group.paths[0]) or "i" not in group.layout for group in adapted),
        conv1d and not method.conv1d,
        method.rescales_bias and _has_bias(adapted, base),
        (scales != 1).any() and not (method.alpha or method.fold or method.scale_free),
    )
    if any(unsaid) or settings.fields(adapter, adapted, method, modules) is None:
        return None
    return method


def _has_bias(groups: Sequence[Group], base: Any) -> bool:
    leaves = {} if base is None else flatten(base)
    return any(f"{path.rpartition('/')[0]}/bias" in leaves for group in groups for path in group.paths)
