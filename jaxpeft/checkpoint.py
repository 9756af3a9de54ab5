"""Saving and loading adapters and training state with Orbax: atomic, strict, and checked bit by bit.

A checkpoint holds the trained arrays, the frozen arrays (index tables as small integers, never re-drawn from a seed),
and metadata: format version, spec, sites, the fingerprint of the base, and a checksum of every array.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from jaxpeft import checks
from jaxpeft import sharding as placing
from jaxpeft.adapter import Adapter, abstract
from jaxpeft.files import check_free
from jaxpeft.fingerprint import fingerprint
from jaxpeft.methods import spec_from_dict
from jaxpeft.sites import Sites, paths_and_leaves
from jaxpeft.spec import method_of
from jaxpeft.summary import saved_dtype

FORMAT = 1
"""Version of what is written. A reader refuses a newer one."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written, is missing, damaged, or newer, or of another adapter, base or training state."""


def save(
    path: str | Path,
    adapter: Adapter,
    *,
    base: Any = None,
    base_fingerprint: str | None = None,
    overwrite: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes an adapter to a folder; the folder appears whole or not at all.

    Args:
        path: a folder that does not exist, or is empty.
        adapter: the adapter; each pool is written once.
        base: the parameters it was trained on; their fingerprint lets `load` refuse another base.
        base_fingerprint: the fingerprint itself, where it is at hand.
        overwrite: whether to replace an adapter that the folder holds.
        extra: anything JSON-able to keep with it; `extra` reads it.

    Raises:
        FileExistsError: the folder holds something already.
        CheckpointError: it cannot be written, for instance because the disk is full.
    """
    checks.adapter(adapter)
    path = Path(path).absolute()
    check_free(path, overwrite, "adapter", _holds_steps)
    with Checkpoints(path, keep=1, asynchronous=False) as checkpoints:
        newest = checkpoints.latest()
        step = 0 if newest is None else newest + 1
        checkpoints.save(step, adapter, base=base, base_fingerprint=base_fingerprint, extra=extra)


def _holds_steps(path: Path) -> bool:
    with Checkpoints(path) as old:
        return old.latest() is not None


def load(path: str | Path, *, base: Any = None, sharding: Sharding | None = None, shardings: Any = None) -> Adapter:
    """Reads the adapter of a folder that `save` or a training run wrote; of a run, the newest step.

    Args:
        path: the folder.
        base: the parameters it is to change; checked against the fingerprint it was saved with.
        sharding: where all its arrays go; by default whole on the default device.
        shardings: of a base on a mesh, as in `adapt`: the adapter goes where that base wants it (`jaxpeft.sharding`).

    Raises:
        CheckpointError: there is no adapter, it is damaged, it is of a newer format, or of another base.
    """
    with Checkpoints(path, read_only=True) as checkpoints:
        step = _newest(checkpoints)
        metadata = checkpoints.metadata(step)
        spec, sites = spec_from_dict(metadata["spec"]), Sites.from_dict(metadata["sites"])
        template = jax.eval_shape(partial(abstract, spec, sites))
        where = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        places = jax.tree.map(lambda leaf: where, template)
        if shardings is not None:
            places = placing.adapter(template, shardings)
        adapter, _, _ = checkpoints.restore(step, placing.shapes(template, places), base=base)
        return adapter


def metadata(path: str | Path) -> dict[str, Any]:
    """What was noted with the adapter that `load` would read; no array is read.

    Returns:
        ``spec`` and ``sites`` as dicts (`jaxpeft.methods.spec_from_dict`, `Sites.from_dict`), ``base``, the base's
        fingerprint or None, ``arrays``, {part: {path: its shape, dtype and sha256}}, ``extra`` and ``metrics``.

    Raises:
        CheckpointError: there is no adapter, or its metadata is damaged.
    """
    with Checkpoints(path, read_only=True) as checkpoints:
        return checkpoints.metadata(_newest(checkpoints))


def extra(path: str | Path) -> dict[str, Any]:
    """What was kept with the adapter that `load` would read.

    Raises:
        CheckpointError: there is no adapter, or its metadata is damaged.
    """
    return metadata(path)["extra"]


class Checkpoints:
    """The checkpoints of a training run in one folder, newest last; a context manager around Orbax's.

    Args:
        folder: created when the first step is saved.
        keep: how many steps to keep; the oldest go first.
        asynchronous: whether `save` returns before the files are complete.
        read_only: whether the folder must be left as it is.

    Examples:
        >>> import tempfile, jax, jax.numpy as jnp, jaxpeft
        >>> from jaxpeft.methods import lora
        >>> base = {"up": {"kernel": jnp.ones((3, 4))}}
        >>> adapter = jaxpeft.init(jax.random.key(0), lora.Spec(rank=2), jaxpeft.find(base))
        >>> with tempfile.TemporaryDirectory() as folder, jaxpeft.checkpoint.Checkpoints(folder) as checkpoints:
        ...     checkpoints.save(10, adapter, base=base, extra={"epoch": 1})
        ...     step = checkpoints.latest()
        ...     restored, _, extra = checkpoints.restore(step, adapter)
        >>> step, extra, bool((restored.params["up/kernel"]["a"] == adapter.params["up/kernel"]["a"]).all())
        (10, {'epoch': 1}, True)
    """

    def __init__(
        self, folder: str | Path, *, keep: int | None = 2, asynchronous: bool = True, read_only: bool = False
    ) -> None:
        import orbax.checkpoint as ocp

        self.folder = Path(folder).absolute()  # Orbax refuses relative paths, but only later and in a thread.
        if read_only and not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} does not exist")
        items = {
            "params": ocp.StandardCheckpointHandler(),
            "constants": ocp.StandardCheckpointHandler(),
            "state": ocp.StandardCheckpointHandler(),
            "metadata": ocp.JsonCheckpointHandler(),
        }
        self._ocp = ocp
        with contextlib.nullcontext() if read_only else self._writing():
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=None if read_only else keep,
                    enable_async_checkpointing=asynchronous and not read_only,
                    read_only=read_only,
                    create=not read_only,
                ),
                item_handlers=items,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # If a process is gone, what the others wait for to complete a save will not happen.
        if jax.process_count() > 1 and kind is not None and issubclass(kind, jax.errors.JaxRuntimeError):
            return
        try:
            with self._writing():
                self._manager.close()
        except CheckpointError:
            # A save that failed is reported once.
            if kind is None or not issubclass(kind, CheckpointError):
                raise

    def latest(self) -> int | None:
        """The newest complete step; None if there is none."""
        self.wait()
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """All complete steps, the newest last."""
        self.wait()
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Returns when every step that was saved is complete.

        Raises:
            CheckpointError: one could not be written, for instance because the disk is full.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def save(
        self,
        step: int,
        adapter: Adapter,
        *,
        base: Any = None,
        base_fingerprint: str | None = None,
        state: Any = None,
        extra: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Saves one step; a step that is not complete is never seen.

        Args:
            step: its number, larger than those before it.
            adapter: the adapter.
            base: the base parameters, for their fingerprint.
            base_fingerprint: the fingerprint itself, where it is at hand.
            state: any further pytree of arrays: optimiser state, random keys.
            extra: anything JSON-able, such as the position in the data.
            metrics: numbers of this step, kept in the metadata.

        Raises:
            CheckpointError: this step, or the one before it, could not be written; those before that stay.
        """
        constants = jax.tree.map(lambda leaf: leaf.astype(saved_dtype(placing.whole(leaf))), adapter.constants)
        if base is not None:
            base_fingerprint = fingerprint(base)
        metadata = {
            "format": FORMAT,
            "spec": dataclasses.replace(adapter.spec, alpha=adapter.alpha).to_dict(),
            "sites": adapter.sites.to_dict(),
            "base": base_fingerprint,
            "arrays": {
                "params": _describe(adapter.params),
                "constants": _describe(constants),
                "state": _describe(state),
            },
            "extra": dict(extra or {}),
            "metrics": dict(metrics or {}),
        }
        args = {
            "params": self._ocp.args.StandardSave(adapter.params),
            "constants": self._ocp.args.StandardSave(constants),
            "metadata": self._ocp.args.JsonSave({**metadata, "sha256": _digest(metadata)}),
        }
        if state is not None:
            args["state"] = self._ocp.args.StandardSave(state)
        with self._writing():
            if jax.process_index() == 0:
                # Where Orbax cannot make a step's folder, its threads wait five minutes for it, and the exit for them.
                (self.folder / ".writable").mkdir(exist_ok=True)
                (self.folder / ".writable").rmdir()
            self._manager.save(step, args=self._ocp.args.Composite(**args))

    def metadata(self, step: int) -> dict[str, Any]:
        """What was noted with a step: spec, sites, fingerprint, arrays, extra, metrics."""
        try:
            found = self._manager.restore(step, args=self._ocp.args.Composite(metadata=self._ocp.args.JsonRestore()))
            metadata = found["metadata"]
            digest, version = metadata.pop("sha256"), metadata["format"]
        except jax.errors.JaxRuntimeError:  # a process is gone, or memory is used up; the files may be whole
            raise
        except Exception as error:
            raise CheckpointError(f"{self._name(step)} has no readable metadata: {_first_line(error)}") from error
        if version > FORMAT:
            raise CheckpointError(
                f"{self._name(step)} has format {version}, but this version of jaxpeft reads up to {FORMAT}; upgrade it"
            )
        if digest != _digest(metadata):
            raise CheckpointError(f"{self._name(step)}: the metadata differs from its checksum, the files are damaged")
        return metadata

    def restore(
        self, step: int, adapter: Adapter, state: Any = None, *, base: Any = None
    ) -> tuple[Adapter, Any, dict[str, Any]]:
        """Reads one step.

        Args:
            step: which one, e.g. `latest()`.
            adapter: structure, shapes, dtypes and shardings to restore onto; arrays or `jax.ShapeDtypeStruct`. The mesh
                may be another than the one it was saved from.
            state: the same for the further state; None to leave it.
            base: the base parameters, checked against the fingerprint that the step was saved with.

        Returns:
            (adapter, state, extra).

        Raises:
            CheckpointError: the step is damaged, or of another spec, sites, base or structure.
        """
        metadata = self.metadata(step)
        spec, sites = spec_from_dict(metadata["spec"]), Sites.from_dict(metadata["sites"])
        if spec != adapter.spec:
            raise CheckpointError(f"{self._name(step)} was saved with {spec}, expected {adapter.spec}")
        if sites != adapter.sites:
            raise CheckpointError(f"{self._name(step)} adapts other sites:\n{sites}\nexpected\n{adapter.sites}")
        if base is not None and metadata["base"] not in (None, found := fingerprint(base)):
            theirs = metadata["base"]
            raise CheckpointError(f"{self._name(step)} is of another base: fingerprint {theirs}, this one's is {found}")
        small = {path: np.dtype(of["dtype"]) for path, of in metadata["arrays"]["constants"].items()}
        dtypes = jax.tree.map(lambda leaf: leaf.dtype, adapter.constants)
        constants = _with_dtypes(adapter.constants, small)
        params = self._read(step, "params", adapter.params, metadata)
        constants = self._read(step, "constants", constants, metadata)
        restored = None if state is None else self._read(step, "state", state, metadata)
        constants = jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), constants, dtypes)
        if check := getattr(method_of(spec), "check_constants", None):
            check(constants, spec, sites)
        return Adapter(params, constants, spec, sites), restored, metadata["extra"]

    def _read(self, step: int, item: str, template: Any, metadata: Mapping[str, Any]) -> Any:
        """One item of a step, compared with its template before, and with its checksums after."""
        name, saved = self._name(step), metadata["arrays"][item]
        wanted = dict(paths_and_leaves(template))
        missing, unexpected = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
        if missing or unexpected:
            raise CheckpointError(
                f"{name}, {item}: missing {missing or 'nothing'}, unexpected {unexpected or 'nothing'}"
            )
        for path, leaf in wanted.items():
            found = (tuple(saved[path]["shape"]), saved[path]["dtype"])
            if found != (expected := (tuple(jnp.shape(leaf)), str(leaf.dtype))):
                raise CheckpointError(f"{name}, {item} {path}: found {found}, expected {expected}")
        abstract = jax.tree.map(self._ocp.utils.to_shape_dtype_struct, template)
        try:
            args = self._ocp.args.Composite(**{item: self._ocp.args.StandardRestore(abstract)})
            restored = self._manager.restore(step, args=args)[item]
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{name}: {item} cannot be read, the files are damaged: {_first_line(error)}"
            ) from error
        for path, leaf in paths_and_leaves(restored):
            if saved[path]["sha256"] != _checksum(leaf):
                raise CheckpointError(f"{name}: {item} {path} differs from its checksum, the files are damaged")
        return restored

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Names what keeps a step from being written."""
        try:
            yield
        except jax.errors.JaxRuntimeError:  # of the devices or the other processes, not of the files
            raise
        except Exception as error:
            # What is being written has another name until it is complete.
            complete = [int(path.name) for path in self.folder.glob("*") if path.name.isdigit()]
            newest = f"the newest complete step is {max(complete)}" if complete else "no step is complete"
            reason = error.strerror if isinstance(error, OSError) and error.strerror else _first_line(error)
            raise CheckpointError(f"checkpoints in {self.folder} cannot be written: {reason}; {newest}") from error

    def _name(self, step: int) -> str:
        others = [other for other in self._manager.all_steps() if other != step]
        return f"checkpoint {self.folder / str(step)}" + (f" (other steps there: {others})" if others else "")


def _newest(checkpoints: Checkpoints) -> int:
    step = checkpoints.latest()
    if step is None:
        is_peft = (checkpoints.folder / "adapter_config.json").is_file()
        hint = "; it is an adapter of Hugging Face PEFT, which jaxpeft.from_peft reads" if is_peft else ""
        raise CheckpointError(f"{checkpoints.folder} holds no checkpoint of an adapter{hint}")
    return step


def _describe(tree: Any) -> dict[str, dict[str, Any]]:
    return {
        path: {"shape": list(jnp.shape(leaf)), "dtype": str(leaf.dtype), "sha256": _checksum(leaf)}
        for path, leaf in paths_and_leaves(tree)
    }


def _checksum(leaf: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(placing.whole(leaf)).tobytes()).hexdigest()


def _digest(metadata: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()


def _with_dtypes(tree: Any, dtypes: Mapping[str, np.dtype]) -> Any:
    """Shapes of a tree in the dtypes it was saved with; paths it was not saved with are reported by the reader."""
    leaves = [
        jax.ShapeDtypeStruct(leaf.shape, dtypes.get(path, leaf.dtype), sharding=getattr(leaf, "sharding", None))
        for path, leaf in paths_and_leaves(tree)
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _first_line(error: Exception) -> str:
    # After the reason, TensorStore writes down all of its settings.
    text = str(error).split(" [tensorstore_spec=")[0].strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
