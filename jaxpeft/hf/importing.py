"""How does a PEFT adapter become one of ours, with nothing dropped and nothing guessed?"""

import dataclasses
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.adapter import Adapter, init
from jaxpeft.hf import files, native, targets
from jaxpeft.hf.names import Modules, Names, Place, from_torch, is_embedding, matrix_at, torch_shaped
from jaxpeft.hf.tensors import PREFIX
from jaxpeft.methods import full, mixed
from jaxpeft.sites import Group, Sites, find, flatten
from jaxpeft.spec import SHARED, Spec

_SHOWN = 40


@dataclass
class _File:
    """The tensors of a file, sorted by what they are.

    Attributes:
        adapted: {torch module: {tensor's name: array}}.
        shared: {tensor's name: array}.
        whole: {torch parameter: array} that replace the base's.
        problems: what does not fit.
    """

    adapted: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    shared: dict[str, np.ndarray] = field(default_factory=dict)
    whole: dict[str, np.ndarray] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def from_peft(
    folder: str | os.PathLike,
    params: Any,
    *,
    names: Names | None = None,
    layouts: Mapping[str, str] | None = None,
) -> Adapter:
    r"""Reads the adapter that Hugging Face PEFT, or `to_peft`, saved.

    LoRA with rsLoRA, DoRA, rank and alpha patterns, PiSSA's and OLoRA's starts and embeddings; VeRA, VB-LoRA, LoHa,
    LoKr, IA3, OFT, BOFT, RandLoRA, C3A, MiSS and HiRA. ``modules_to_save`` and biases become parts of a mixed spec that
    are trained whole. Where layers of one group have different ranks, the smaller are filled up with zeros, which get
    no gradient.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        params: the base parameters, in Flax; nothing of the torch model is needed.
        names: torch's module for a path of ours, as in `to_peft`.
        layouts: declared layouts, as in `jaxpeft.find`; GPT-2's kernels are ``{r".*/c_\\w+/kernel": "oi"}``.

    Returns:
        An adapter with float32 arrays that changes the model as PEFT's does.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        ValueError: another method, a field that changes the mathematics and is not supported, a pickle; or tensors that
            are missing, unexpected or of another shape: all are listed at once.

    Examples:
        >>> import tempfile, jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import vera
        >>> params = {"up": {"kernel": jnp.ones((64, 32))}}
        >>> adapter = jaxpeft.init(jax.random.key(0), vera.Spec(rank=8), jaxpeft.find(params))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = jaxpeft.to_peft(folder, adapter, base_model="some/model")
        ...     loaded = jaxpeft.from_peft(folder, params)
        >>> bool((jaxpeft.delta(loaded)["up/kernel"] == jaxpeft.delta(adapter)["up/kernel"]).all())
        True
    """
    folder = Path(folder).absolute()
    config, tensors = files.read(folder)
    method = targets.method_of(config, folder)
    config = {**method.defaults, **config}
    modules = Modules(flatten(params), names)
    places = modules.of_tree(params, layouts)
    file = _sorted(tensors, config, method, places, params)
    if file.problems:
        raise _error(folder, file.problems)
    _check_tied(file, modules, params)
    sites = _sites(file, places, params, layouts)
    specs = {
        group.name: [targets.spec_of(config, method, _module(name)) for name in modules.of_group(group)]
        for group in sites[0]
    }
    if problems := _wrong(file, method, sites[0], specs, modules):
        raise _error(folder, problems)
    return _filled(file, method, sites, specs, modules, places, params)


def _error(folder: Path, problems: Sequence[str]) -> ValueError:
    rest = f"\n  … {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return ValueError(f"{folder}: {len(problems)} problems:\n  " + "\n  ".join(problems[:_SHOWN]) + rest)


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _sorted(
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    method: native.Format,
    places: Mapping[str, Place],
    params: Any,
) -> _File:
    """Every tensor in its place, and what is missing or has none."""
    file, leaves, kinds = _File(), flatten(params), {}
    for tensor in method.tensors(targets.spec_of(config, method, "")):
        kinds |= {tensor.name: tensor.name} | ({tensor.embedding: tensor.name} if tensor.embedding else {})
    copies = {}
    for key, array in tensors.items():
        rest = key.removeprefix(PREFIX)
        kind = next((kind for kind in kinds if rest.endswith(f".{kind}")), None)
        copy = next((tensor.name for tensor in method.shared if rest.endswith(f".{tensor.name}")), None)
        parameter = rest.replace(".base_layer.", ".")
        if kind is not None and rest != key:
            file.adapted.setdefault(rest.removesuffix(f".{kind}"), {})[kinds[kind]] = array
        elif copy is not None and rest == key:
            file.shared[copy] = array
        elif copy is not None and method.repeated:
            copies[key] = copy, array
        elif parameter in places and rest != key:
            place = places[parameter]
            own = torch_shaped(matrix_at(leaves, place), place)
            if own.shape != array.shape:
                file.problems.append(f"shape: {key} is {array.shape} in the file and {own.shape} in the base")
            elif targets.is_trained_whole(config, method, parameter):
                file.whole[parameter] = array
            elif not np.array_equal(own, array):
                file.problems.append(f"unexpected: {key}, a weight of another base (save_embedding_layers=False)")
        else:
            file.problems.append(f"unexpected: {key} {array.shape}")
    for key, (copy, array) in copies.items():
        if copy in file.shared and not np.array_equal(file.shared[copy], array):
            file.problems.append(f"unexpected: {key} differs from base_model.{copy}")
    linear = [_module(name) for name, place in places.items() if "i" in place.layout]
    wanted = set(targets.matched(config, linear))
    file.problems += [f"missing: the tensors of {name}" for name in linear if name in wanted - set(file.adapted)]
    for name in file.adapted:
        if name not in linear:
            file.problems.append(f"unexpected: tensors of {name}, which is no module of the base")
        elif name not in wanted:
            file.problems.append(f"unexpected: tensors of {name}, which target_modules does not name")
    for name in places:
        adapted = _module(name) in file.adapted
        if targets.is_trained_whole(config, method, name, adapted) and name not in file.whole:
            file.problems.append(f"missing: {PREFIX}{name}")
    file.problems += [f"missing: base_model.{each.name}" for each in method.shared if each.name not in file.shared]
    return file


def _check_tied(file: _File, modules: Modules, params: Any) -> None:
    """Refuses an embedding of a tied decoder: ours is one array, of which PEFT changes one use."""
    embedded = {name for name in (*file.adapted, *map(_module, file.whole)) if name == "model.embed_tokens"}
    if modules.decoder and embedded and "lm_head/kernel" not in flatten(params):
        raise ValueError(
            "model.embed_tokens is adapted and this base's head is tied to it; PEFT changes the embedding alone, "
            "which one array cannot. Untie the base: give it an lm_head/kernel, the embedding transposed"
        )


def _sites(
    file: _File, places: Mapping[str, Place], params: Any, layouts: Mapping[str, str] | None
) -> tuple[Sites, Sites]:
    """The adapted groups and those that are replaced, cut down to the layers in the file."""
    found = []
    for parameters in ([f"{name}.weight" for name in file.adapted], list(file.whole)):
        layers: dict[str, list[int]] = {}
        for name in parameters:
            layers.setdefault(places[name].path, []).append(places[name].layer)
        groups = find(params, lambda path, leaf, layers=layers: path in layers, layouts=layouts) if layers else ()
        found.append(Sites(tuple(_cut(group, layers) for group in groups)))
    names = Counter(group.name for sites in found for group in sites)
    if twice := [name for name, times in names.items() if times > 1]:
        raise ValueError(f"{twice[0]} is adapted in some layers and trained whole in others, which one adapter cannot")
    return found[0], found[1]


def _cut(group: Group, layers: Mapping[str, Sequence[int]]) -> Group:
    """A group with the stack entries that are in the file alone."""
    stack = group.sizes("l")
    if not stack:
        return group
    kept = {tuple(sorted(layers[path])) for path in group.paths}
    numbers = np.arange(int(np.prod(stack))).reshape(stack)
    entries = sorted({int(n) // int(np.prod(stack[1:])) for each in kept for n in each})
    if kept != {tuple(int(n) for n in numbers[entries].flatten())}:
        raise ValueError(f"{group.name}: the file adapts parts of a stack that are no whole entries of its first axis")
    return dataclasses.replace(group, entries=None if len(entries) == stack[0] else tuple(entries))


def _wrong(
    file: _File, method: native.Format, sites: Sites, specs: Mapping[str, Sequence[Any]], modules: Modules
) -> list[str]:
    """Tensors of a module that are missing or of another shape than its spec says."""
    problems, known = [], {}
    for group in sites:
        vector = is_embedding(group.paths[0])
        for name, spec in zip(modules.of_group(group), specs[group.name], strict=True):
            if vector and (method is not native.LORA or spec.dora):
                problems.append(f"{_module(name)} is an embedding, on which only LoRA without DoRA is read")
                continue
            key = spec, group.in_dim, group.out_dim
            if key not in known:
                known[key] = jax.eval_shape(lambda key=key: _leaves(*key))
            shapes = known[key]
            found = file.adapted[_module(name)]
            for tensor in method.tensors(spec):
                if tensor.leaf not in shapes:
                    continue
                kind = tensor.embedding if vector else tensor.name
                if tensor.name not in found:
                    problems.append(f"missing: {PREFIX}{_module(name)}.{kind}")
                    continue
                expected = tensor.view.write(np.zeros(shapes[tensor.leaf].shape[1:], np.float32)).shape
                if found[tensor.name].shape != expected:
                    shape = found[tensor.name].shape
                    problems.append(f"shape: {PREFIX}{_module(name)}.{kind} is {shape}, expected {expected}")
            extra = set(found) - {tensor.name for tensor in method.tensors(spec) if tensor.leaf in shapes}
            problems += [f"unexpected: {PREFIX}{_module(name)}.{kind}" for kind in sorted(extra)]
    return problems


def _leaves(spec: Spec, in_dim: int, out_dim: int) -> dict[str, Any]:
    """The trained arrays of one weight."""
    zeros = {"w": jnp.zeros((in_dim, out_dim))}
    return init(jax.random.key(0), spec, Sites((Group("w", ("w",), (in_dim, out_dim), "io"),)), zeros).params["w"]


def _filled(
    file: _File,
    method: native.Format,
    sites: tuple[Sites, Sites],
    specs: Mapping[str, Sequence[Any]],
    modules: Modules,
    places: Mapping[str, Place],
    params: Any,
) -> Adapter:
    """The adapter, its arrays those of the file."""
    adapted, whole = sites
    parts = {group.name: _part(group, specs[group.name], method) for group in adapted}
    spec = _combined(parts, adapted, whole)
    both = Sites((*adapted, *whole))
    reads_base = any(part.dora or part.start != "method" for part in parts.values())
    adapter = init(jax.random.key(0), spec, both, params if reads_base else None)
    trained, frozen = dict(adapter.params), dict(adapter.constants)
    for group in adapted:
        names = [_module(name) for name in modules.of_group(group)]
        known = {tensor.leaf: tensor for tensor in method.tensors(parts[group.name])}
        trained[group.name] = {
            leaf: jnp.stack(
                [_grown(known[leaf].view.read(file.adapted[n][known[leaf].name]), old.shape[1:]) for n in names]
            )
            for leaf, old in trained[group.name].items()
        }
        scales = [each.scale(group) for each in specs[group.name]]
        frozen[group.name] = {**frozen[group.name], "scale": jnp.asarray(scales, jnp.float32)}
    leaves = flatten(params)
    for group in whole:
        at = [(name, places[name]) for name in modules.of_group(group)]
        changes = [from_torch(file.whole[name], place) - matrix_at(leaves, place) for name, place in at]
        trained[group.name] = {"w": jnp.asarray(np.stack(changes))}
    for tensor in method.shared:
        tree = frozen if tensor.frozen else trained
        own, number = tree[SHARED], "0" if isinstance(spec, mixed.Spec) else None
        arrays = dict(own if number is None else own[number])
        found = jnp.asarray(tensor.view.read(file.shared[tensor.name]))
        if found.shape != arrays[tensor.leaf].shape:
            raise ValueError(f"base_model.{tensor.name}: {found.shape} is not {arrays[tensor.leaf].shape}")
        arrays[tensor.leaf] = found
        tree[SHARED] = arrays if number is None else {**own, number: arrays}
    return adapter.replace(params=trained, constants=frozen)


def _grown(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """An array with zeros for the ranks it has not."""
    return np.pad(array, [(0, size - own) for size, own in zip(shape, array.shape, strict=True)])


def _part(group: Group, specs: Sequence[Any], method: native.Format) -> Any:
    """The one spec of a group; of LoRA, that of its largest rank.

    Raises:
        ValueError: layers of the group differ in more than LoRA's rank and alpha.
    """
    largest = max(specs, key=lambda spec: getattr(spec, "rank", 0))
    others = [spec for spec in specs if spec != largest]
    if largest.start != "method":  # Then the scale is in the start.
        others = [spec for spec in specs if (spec, spec.alpha) != (largest, largest.alpha)]
    if others and (method is not native.LORA or largest.start != "method"):
        raise ValueError(f"{group.name}: its layers have different settings, {largest} and {others[0]}")
    return largest


def _combined(parts: Mapping[str, Any], adapted: Sites, whole: Sites) -> Spec:
    """One spec, or a mixed one whose default is the commonest."""
    keys = {name: (part, part.alpha) for name, part in parts.items()}
    ((default, _),) = Counter(keys.values()).most_common(1)
    overrides = {
        mixed.pattern(group, adapted, whole): parts[group.name] for group in adapted if keys[group.name] != default
    }
    overrides |= {mixed.pattern(group, adapted, whole): full.Spec() for group in whole}
    return mixed.Spec(default=default[0], overrides=overrides) if overrides else default[0]
