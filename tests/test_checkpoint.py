"""Checkpoints: strict, checked, onto any mesh; and every kind of damage is a clear error."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxpeft
from jaxpeft.checkpoint import Checkpoints
from jaxpeft.fingerprint import fingerprint
from jaxpeft.methods import lora, mos

BASE = {"layers": [{"up": {"kernel": jax.random.normal(jax.random.key(i), (16, 8))}} for i in range(4)]}
SITES = jaxpeft.find(BASE)
SPEC = mos.Spec(rank=4, equivalent_rank=2, shards_per_vector=2)


def adapter_of(spec=SPEC, sites=SITES, seed: int = 0) -> jaxpeft.Adapter:
    adapter = jaxpeft.init(jax.random.key(seed), spec, sites)
    return adapter.replace(params=jax.tree.map(lambda leaf: leaf + 0.5, adapter.params))


def assert_equal(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for new, old in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert new.dtype == old.dtype
        np.testing.assert_array_equal(new, old)


def test_training_state_extra_and_metrics_come_back(tmp_path) -> None:
    adapter, optimizer = adapter_of(), optax.adam(1e-3)
    state = {"optimizer": optimizer.init(adapter.params), "key": jax.random.key(3), "step": jnp.int32(7)}
    with Checkpoints(tmp_path / "run", keep=2) as checkpoints:
        assert checkpoints.latest() is None
        for step in (1, 5, 9):
            moved = adapter.replace(params=jax.tree.map(lambda leaf, n=step: leaf * n, adapter.params))
            checkpoints.save(step, moved, base=BASE, state=state, extra={"row": step}, metrics={"loss": 0.5})
        assert checkpoints.latest() == 9
    with Checkpoints(tmp_path / "run") as checkpoints:
        restored, found, extra = checkpoints.restore(9, adapter, state, base=BASE)
        assert checkpoints.metadata(9)["metrics"] == {"loss": 0.5}
        older, _, _ = checkpoints.restore(5, adapter)
    assert extra == {"row": 9}
    assert_equal(restored, moved)
    assert_equal(older.params, jax.tree.map(lambda leaf: leaf * 5, adapter.params))
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert (jax.random.key_data(found["key"]) == jax.random.key_data(state["key"])).all()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["5", "9"]
    assert_equal(jaxpeft.load(tmp_path / "run", base=BASE), moved)


def test_pools_are_stored_once_and_indices_as_small_integers(tmp_path) -> None:
    adapter = adapter_of()
    jaxpeft.save(tmp_path / "adapter", adapter)
    with Checkpoints(tmp_path / "adapter", read_only=True) as checkpoints:
        arrays = checkpoints.metadata(0)["arrays"]
    assert arrays["params"]["layers/*/up/kernel/a"]["shape"] == [16, 8]
    assert arrays["constants"]["layers/*/up/kernel/a_index"]["dtype"] == "uint8"
    assert jaxpeft.load(tmp_path / "adapter").constants["layers/*/up/kernel"]["a_index"].dtype == jnp.int32


def test_onto_another_mesh(tmp_path) -> None:
    adapter = adapter_of()
    jaxpeft.save(tmp_path / "adapter", adapter)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, P())
    loaded = jaxpeft.load(tmp_path / "adapter", sharding=everywhere)
    assert {leaf.sharding for leaf in jax.tree.leaves(loaded.params)} == {everywhere}
    assert_equal(loaded, adapter)
    split = NamedSharding(mesh, P(None, "data"))
    template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), adapter)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=split), adapter.params)
    params["layers/*/up/kernel"]["b"] = template.params["layers/*/up/kernel"]["b"]
    with Checkpoints(tmp_path / "adapter") as checkpoints:
        restored, _, _ = checkpoints.restore(0, template.replace(params=params))
    assert restored.params["layers/*/up/kernel"]["a"].sharding == split
    assert_equal(restored, adapter)


def test_saving_does_not_overwrite_unasked(tmp_path) -> None:
    adapter, other = adapter_of(), adapter_of(seed=1)
    jaxpeft.save(tmp_path / "a", adapter)
    with pytest.raises(FileExistsError, match="holds something already"):
        jaxpeft.save(tmp_path / "a", other)
    assert_equal(jaxpeft.load(tmp_path / "a"), adapter)
    jaxpeft.save(tmp_path / "a", other, overwrite=True)
    assert_equal(jaxpeft.load(tmp_path / "a"), other)
    assert len(list((tmp_path / "a").iterdir())) == 1
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="files that are no adapter"):
        jaxpeft.save(tmp_path / "b", adapter, overwrite=True)
    assert (tmp_path / "b" / "notes.txt").read_text() == "mine"


def test_relative_paths(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    jaxpeft.save("adapter", adapter_of())
    assert_equal(jaxpeft.load("adapter"), adapter_of())


def test_nothing_there(tmp_path) -> None:
    with pytest.raises(jaxpeft.CheckpointError, match="does not exist"):
        jaxpeft.load(tmp_path / "nowhere")
    with pytest.raises(jaxpeft.CheckpointError, match="holds no checkpoint"):
        jaxpeft.load(tmp_path)


def test_what_another_program_saved(tmp_path) -> None:
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(tmp_path / "theirs") as manager:
        manager.save(3, args=ocp.args.StandardSave({"w": jnp.ones(3)}))
    with pytest.raises(jaxpeft.CheckpointError, match="no readable metadata"):
        jaxpeft.load(tmp_path / "theirs")


def test_fingerprint() -> None:
    assert fingerprint(BASE) == fingerprint(jax.tree.map(np.asarray, BASE))
    assert fingerprint(BASE) == fingerprint(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), BASE))
    assert fingerprint(BASE) != fingerprint(jax.tree.map(lambda leaf: leaf + 1, BASE))
    assert fingerprint(BASE) != fingerprint({"layers": BASE["layers"][:3]})


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_of_a_base_on_a_mesh(kind, tmp_path) -> None:
    """It is the fingerprint of the base on one device, whatever axes of a kernel are split."""
    base = {"up": {"kernel": jax.random.normal(jax.random.key(0), (4, 8, 16))}}
    adapter = jaxpeft.init(jax.random.key(1), lora.Spec(rank=2), jaxpeft.find(base, ".*", layouts={".*": "lio"}))
    jaxpeft.save(tmp_path / "a", adapter, base=base)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(kind,) * 3)
    placed = jax.device_put(base, NamedSharding(mesh, P(None, "fsdp", "tensor")))
    assert fingerprint(placed) == fingerprint(base)
    with jax.set_mesh(mesh):
        jaxpeft.save(tmp_path / "b", adapter, base=placed)
        assert_equal(jaxpeft.load(tmp_path / "a", base=placed), adapter)
    assert_equal(jaxpeft.load(tmp_path / "b", base=base), adapter)


def test_another_base_spec_sites_or_state(tmp_path) -> None:
    adapter, state = adapter_of(), {"count": jnp.zeros(3)}
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, adapter, base=BASE, state=state)
        checkpoints.wait()

        def refused(match: str, adapter=adapter, state=state, base=BASE) -> None:
            with pytest.raises(jaxpeft.CheckpointError, match=match):
                checkpoints.restore(1, adapter, state, base=base)

        refused("is of another base", base=jax.tree.map(lambda leaf: leaf * 2, BASE))
        refused("was saved with Spec.*rank=4.*expected Spec.*rank=2", adapter=adapter_of(lora.Spec(rank=2)))
        refused("adapts other sites", adapter=adapter_of(sites=jaxpeft.find(BASE, layers=[0, 1, 2])))
        refused(r"missing \['momentum'\], unexpected \['count'\]", state={"momentum": jnp.zeros(3)})
        refused(
            r"state count: found \(\(3,\), 'float32'\), expected \(\(4,\), 'float32'\)", state={"count": jnp.zeros(4)}
        )
        refused("expected .*bfloat16", state={"count": jnp.zeros(3, jnp.bfloat16)})
    with pytest.raises(jaxpeft.CheckpointError, match="is of another base"):
        jaxpeft.load(tmp_path / "run", base=jax.tree.map(lambda leaf: leaf * 2, BASE))


def damaged(source: Path, target: Path, damage) -> Path:
    shutil.copytree(source, target)
    damage(target / "0")
    return target


def data_files(item: Path) -> list[Path]:
    return [path for path in item.rglob("*") if path.is_file() and path.parent.name == "d"]


def each(files: list[Path], change) -> None:
    assert files
    for file in files:
        change(file)


def flip(file: Path, at: float = 0.5) -> None:
    data = bytearray(file.read_bytes())
    data[int(len(data) * at)] ^= 0x10
    file.write_bytes(bytes(data))


def metadata_file(step: Path) -> Path:
    return next(path for path in (step / "metadata").iterdir() if path.is_file() and path.name.startswith("metadata"))


def rewrite(step: Path, **changes) -> None:
    file = metadata_file(step)
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


DAMAGES = {
    "array cut short": lambda step: each(data_files(step / "params"), lambda f: f.write_bytes(f.read_bytes()[:-9])),
    "array file gone": lambda step: each(data_files(step / "params"), Path.unlink),
    "index tables gone": lambda step: shutil.rmtree(step / "constants"),
    "metadata gone": lambda step: shutil.rmtree(step / "metadata"),
    "metadata cut short": lambda step: metadata_file(step).write_text(metadata_file(step).read_text()[:40]),
    "metadata changed": lambda step: rewrite(step, base="0" * 32),
    "newer format": lambda step: rewrite(step, format=99),
    "a bit flipped in an array": lambda step: each(data_files(step / "params"), flip),
    "a bit flipped in the index tables": lambda step: each(data_files(step / "constants"), flip),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(damage, tmp_path) -> None:
    jaxpeft.save(tmp_path / "good", adapter_of(), base=BASE)
    bad = damaged(tmp_path / "good", tmp_path / "bad", DAMAGES[damage])
    expected = "has format 99.*reads up to 1; upgrade" if damage == "newer format" else "damaged|no readable metadata"
    with pytest.raises(jaxpeft.CheckpointError, match=expected) as error:
        jaxpeft.load(bad, base=BASE)
    assert str(bad / "0") in str(error.value)
    assert_equal(jaxpeft.load(tmp_path / "good", base=BASE), adapter_of())


def test_a_flipped_bit_anywhere_is_found_or_harmless(tmp_path) -> None:
    jaxpeft.save(tmp_path / "good", adapter_of(), base=BASE)
    files = [path.relative_to(tmp_path / "good") for path in (tmp_path / "good").rglob("*") if path.is_file()]
    found = 0
    for number, file in enumerate(files):
        shutil.copytree(tmp_path / "good", tmp_path / str(number))
        flip(tmp_path / str(number) / file)
        try:
            assert_equal(jaxpeft.load(tmp_path / str(number), base=BASE), adapter_of())
        except jaxpeft.CheckpointError:
            found += 1
    assert found >= 5, "arrays, index tables, manifests and metadata are all covered"


def test_an_unfinished_step_is_not_seen(tmp_path) -> None:
    jaxpeft.save(tmp_path / "run", adapter_of())
    shutil.copytree(tmp_path / "run" / "0", tmp_path / "run" / "1.orbax-checkpoint-tmp-12")
    (tmp_path / "run" / ".writable").mkdir()  # of a process that was killed just then
    assert_equal(jaxpeft.load(tmp_path / "run"), adapter_of())
    jaxpeft.save(tmp_path / "run", adapter_of(seed=1), overwrite=True)
    assert_equal(jaxpeft.load(tmp_path / "run"), adapter_of(seed=1))


def test_what_is_kept_with_an_adapter(tmp_path) -> None:
    jaxpeft.save(tmp_path / "a", adapter_of(), extra={"tokenizer": "abc"})
    assert jaxpeft.checkpoint.extra(tmp_path / "a") == {"tokenizer": "abc"}
    with pytest.raises(jaxpeft.CheckpointError, match="holds no checkpoint"):
        jaxpeft.checkpoint.extra(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(jaxpeft.CheckpointError, match="cannot be written: Not a directory; no step is complete"):
        jaxpeft.save(tmp_path / "file" / "adapter", adapter_of())


def test_alpha_is_what_the_arrays_say(tmp_path) -> None:
    """Specs that differ in alpha alone are equal, so jit returns the first one's with the arrays of the other."""
    first = adapter_of()
    second = first.with_alpha(64.0)

    @jax.jit
    def step(adapter):
        return adapter.replace(params=jax.tree.map(lambda leaf: leaf * 1.0, adapter.params))

    step(first)
    stepped = step(second)
    assert stepped.alpha == 64.0
    same = [stepped.with_alpha(8.0), first.with_alpha(8.0), jax.jit(lambda one: one.with_alpha(8.0))(second)]
    for one in same:
        jax.tree.map(np.testing.assert_array_equal, one.constants, same[0].constants)
    jaxpeft.save(tmp_path / "adapter", stepped)
    loaded = jaxpeft.load(tmp_path / "adapter")
    assert loaded.spec.alpha == loaded.alpha == 64.0
    jax.tree.map(np.testing.assert_array_equal, loaded.constants, second.constants)
