"""The methods, one file each: a Spec, `init`, `updates` and the parameter formula `count`."""

import dataclasses
import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from jaxpeft.methods import (
    adalora,
    alore,
    aslora,
    beamlora,
    boft,
    c3a,
    dynamic_dora,
    fourierft,
    full,
    glora,
    hira,
    ia3,
    increlora,
    lily,
    loha,
    lokr,
    lora,
    loramini,
    loraxs,
    lorta,
    lotr,
    malora,
    melora,
    miss,
    mixed,
    mos,
    mtllora,
    multilora,
    nola,
    oft,
    prolora,
    randlora,
    rows,
    sharelora,
    smoa_structured,
    sora,
    superlora,
    surm,
    surm_block,
    tiedlora,
    tinylora,
    unilora,
    vblora,
    vera,
)
from jaxpeft.spec import Spec, nearest

METHODS: dict[str, ModuleType] = {
    "adalora": adalora,
    "alore": alore,
    "aslora": aslora,
    "beamlora": beamlora,
    "boft": boft,
    "c3a": c3a,
    "dynamic_dora": dynamic_dora,
    "fourierft": fourierft,
    "full": full,
    "glora": glora,
    "hira": hira,
    "ia3": ia3,
    "increlora": increlora,
    "lily": lily,
    "loha": loha,
    "lokr": lokr,
    "lora": lora,
    "loramini": loramini,
    "loraxs": loraxs,
    "lorta": lorta,
    "lotr": lotr,
    "malora": malora,
    "melora": melora,
    "miss": miss,
    "mixed": mixed,
    "mos": mos,
    "mtllora": mtllora,
    "multilora": multilora,
    "nola": nola,
    "oft": oft,
    "prolora": prolora,
    "randlora": randlora,
    "rows": rows,
    "sharelora": sharelora,
    "smoa_structured": smoa_structured,
    "sora": sora,
    "superlora": superlora,
    "surm": surm,
    "surm_block": surm_block,
    "tiedlora": tiedlora,
    "tinylora": tinylora,
    "unilora": unilora,
    "vblora": vblora,
    "vera": vera,
}

TYPICAL: dict[str, Spec] = {
    "adalora": adalora.Spec(rank=3, target_rank=1),
    "alore": alore.Spec(rank=2, experts=4),
    "aslora": aslora.Spec(rank=4),
    "beamlora": beamlora.Spec(rank=2),
    "boft": boft.Spec(block_size=8),
    "c3a": c3a.Spec(block_size=64),
    "dynamic_dora": dynamic_dora.Spec(rank=3, target_rank=1),
    "fourierft": fourierft.Spec(),
    "full": full.Spec(),
    "glora": glora.Spec(rank=2),
    "hira": hira.Spec(rank=2),
    "ia3": ia3.Spec(),
    "increlora": increlora.Spec(rank=4, target_rank=2),
    "lily": lily.Spec(rank=4, experts=4),
    "loha": loha.Spec(rank=2),
    "lokr": lokr.Spec(rank=8, decompose_factor=8),
    "lora": lora.Spec(rank=2),
    "loramini": loramini.Spec(rank=8, outer_in=64, outer_out=64),
    "loraxs": loraxs.Spec(rank=16),
    "lorta": lorta.Spec(rank=16, heads=32),
    "lotr": lotr.Spec(rank=16),
    "malora": malora.Spec(rank=2, shared_rank=4, experts=2),
    "melora": melora.Spec(rank=2, mini_loras=4),
    "miss": miss.Spec(rank=4),
    "mixed": mixed.Spec(default=lora.Spec(rank=2), overrides={}),
    "mos": mos.Spec(rank=8, equivalent_rank=2, private_rank=1, shards_per_vector=4),
    "mtllora": mtllora.Spec(rank=2, tasks=2, projections=2),
    "multilora": multilora.Spec(rank=1, parallel=2),
    "nola": nola.Spec(rank=8, bases=1024),
    "oft": oft.Spec(block_size=8),
    "prolora": prolora.Spec(rank=8, unshared_rank=1, sharing_in=7, sharing_out=7),
    "randlora": randlora.Spec(rank=64),
    "rows": rows.Spec(indices=(0,)),
    "sharelora": sharelora.Spec(rank=4),
    "smoa_structured": smoa_structured.Spec(rank=1),
    "sora": sora.Spec(rank=2),
    "superlora": superlora.Spec(groups="weight", order=2, rank=2, fold="matrix"),
    "surm": surm.Spec(kind="ldr", rank=1),
    "surm_block": surm_block.Spec(kind="ldr", rank=1),
    "tiedlora": tiedlora.Spec(rank=64),
    "tinylora": tinylora.Spec(u=64),
    "unilora": unilora.Spec(rank=4, theta_length=2**20),
    "vblora": vblora.Spec(rank=4, num_vectors=256, vector_length=64),
    "vera": vera.Spec(rank=256),
}
"""A setting of each that is at home in a small budget, for tables; `jaxpeft.fit_budget` starts from it."""


def spec_from_dict(description: Mapping[str, Any]) -> Spec:
    """The spec that `Spec.to_dict` described.

    A name that is not in `METHODS` is imported as a module, so methods outside this package load as well.

    Raises:
        ValueError: the method or one of its hyper-parameters is unknown, or a value is out of range.
    """
    fields = dict(description)
    name = fields.pop("method", None)
    if name in METHODS:
        method = METHODS[name]
    else:
        try:
            method = importlib.import_module(str(name))
        except ImportError:
            raise ValueError(f"unknown method {name!r}; {nearest(str(name), METHODS)}") from None
    known = [field.name for field in dataclasses.fields(method.Spec)]
    if unknown := [field for field in fields if field not in known]:
        hints = "; ".join(f"{field!r}: {nearest(field, known)}" for field in unknown)
        raise ValueError(f"{name}.Spec has no such hyper-parameter: {hints}")
    return method.Spec(**fields)
