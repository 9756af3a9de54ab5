"""The methods, one file each: a Spec, `init`, `updates` and the parameter formula `count`."""

import dataclasses
import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from jaxpeft.methods import lora, mos, prolora
from jaxpeft.spec import Spec, nearest

METHODS: dict[str, ModuleType] = {"lora": lora, "mos": mos, "prolora": prolora}


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
