"""What does a PEFT config say: which method, which modules, which settings of each, and what of it is not supported?"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxpeft.hf import native
from jaxpeft.names import HEADS
from jaxpeft.selection import ALL_LINEAR
from jaxpeft.spec import Spec, nearest

_COMMON = (
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_ia3_weights",
    "init_lora_weights",
    "init_weights",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "revision",
    "target_modules",
    "task_type",
)
_STARTS = ("true", "false", "gaussian", "eva", "orthogonal", "pissa", "olora")
"""Starts of LoRA that leave the base as it is, or change it in a way that follows from it."""


def method_of(config: Mapping[str, Any], folder: Path) -> native.Format:
    """The form of the config's method.

    Raises:
        ValueError: it is not read, or a field that changes the mathematics has a value that is not supported.
    """
    kind = str(config.get("peft_type"))
    method = next((each for each in native.FORMATS if each.peft_type == kind), None)
    if method is None:
        known = [each.peft_type for each in native.FORMATS]
        raise ValueError(f"{folder}: peft_type={kind!r} is not read; {nearest(kind, known)}")
    read = {*_COMMON, *method.defaults, *method.ignored, *method.patterns, *method.listed}
    refused = [
        f"{field}={value!r} (only {method.fixed[field]!r})"
        for field, value in config.items()
        if field in method.fixed and value != method.fixed[field]
    ]
    refused += [
        f"{field}={value!r}" for field, value in config.items() if value and field not in read | method.fixed.keys()
    ]
    if method is native.LORA and str(config.get("init_lora_weights", True)).lower() not in _STARTS:
        start = config["init_lora_weights"]
        refused.append(
            f"init_lora_weights={start!r}: it changed the base weights in a way that the file does not hold; save it "
            "in PEFT with path_initial_model_for_weight_conversion, which makes it an ordinary LoRA"
        )
    bias = config.get("bias", "none")
    if str(bias).lower() not in ("none", "all", method.bias_only):
        refused.append(f"bias={bias!r} (only 'none', 'all' and {method.bias_only!r})")
    if refused:
        raise ValueError(f"{folder}: {method.peft_type} with settings that are not supported: {'; '.join(refused)}")
    return method


def fields_of(config: Mapping[str, Any], method: native.Format, module: str) -> dict[str, Any]:
    """The config's fields for one module, its patterns looked up."""
    fields = dict(config)
    for pattern, of in method.patterns.items():
        for key, value in (config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", module):
                fields[of] = value
                break
    for listing, of in method.listed.items():
        fields[of] = _names(config.get(listing) or [], module)
    return fields


def spec_of(config: Mapping[str, Any], method: native.Format, module: str) -> Spec:
    """The spec of one module.

    Raises:
        ValueError: a value of the config is of another type, or out of range.
    """
    try:
        return method.spec(fields_of(config, method, module))
    except (TypeError, AttributeError) as error:
        raise ValueError(
            f"the config's fields of {module or 'all modules'} are no {method.peft_type}: {error}"
        ) from None


def _names(names: str | Sequence[str], module: str) -> bool:
    """Whether a regular expression, or a list of names or their ends, names a module."""
    if isinstance(names, str):
        return bool(re.fullmatch(names, module))
    return any(module == name or module.endswith(f".{name}") for name in names)


def matched(config: Mapping[str, Any], modules: Sequence[str]) -> list[str]:
    """The modules that the config adapts."""
    wanted, excluded = config.get("target_modules") or [], config.get("exclude_modules") or []
    chosen = [name for name in modules if not _names(excluded, name) and not _is_saved(config, name)]
    if wanted == ALL_LINEAR:
        return [name for name in chosen if name.rpartition(".")[2] not in (*HEADS, "embed_tokens")]
    chosen = [name for name in chosen if _names(wanted, name)]
    if isinstance(wanted, str) or config.get("layers_to_transform") in (None, []):
        return chosen
    only = config["layers_to_transform"]
    only = only if isinstance(only, list) else [only]
    return [name for name in chosen if name in wanted or _layer(name, config.get("layers_pattern")) in only]


def _layer(module: str, patterns: str | Sequence[str] | None) -> int | None:
    """Number of a module's layer: the first step that is one, behind one of the patterns if there are any."""
    names = [patterns] if isinstance(patterns, str) else patterns or [r"[^.]*"]
    for name in names:
        if found := re.match(rf"(?:^|.*?\.){name}\.(\d+)\.", module):
            return int(found[1])
    return None


def _is_saved(config: Mapping[str, Any], module: str) -> bool:
    return any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in config.get("modules_to_save") or [])


def is_trained_whole(
    config: Mapping[str, Any], method: native.Format, parameter: str, adapted: bool | None = None
) -> bool:
    """Whether a parameter is replaced, by ``modules_to_save`` or by ``bias``."""
    module, _, leaf = parameter.rpartition(".")
    if _is_saved(config, module):
        return True
    bias = config.get("bias", "none")
    if leaf != "bias" or bias == "none":
        return False
    return bias == "all" or adapted is not False
