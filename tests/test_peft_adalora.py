"""AdaLoRA merges and allocates as in Hugging Face PEFT."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft_oracle as oracle
import pytest

import jaxpeft
from jaxpeft import allocate
from jaxpeft.methods import adalora

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'jaxpeft[parity]'")

LAYERS, RANK, TARGET, STEPS, INITIAL, FINAL = 3, 4, 2, 10, 2, 3
LEAVES = {"a": "lora_A", "b": "lora_B", "gate": "lora_E"}


def name_of(layer: int, leaf: str) -> str:
    return f"base_model.model.layers.{layer}.proj.{LEAVES[leaf]}.default"


def in_shape(leaf: str, array):
    """One layer's array in PEFT's shape."""
    return {"a": array, "b": array.T, "gate": array[..., None]}[leaf]


def config_of(every: int = 1):
    return peft.AdaLoraConfig(
        init_r=RANK,
        target_r=TARGET,
        lora_alpha=8,
        tinit=INITIAL,
        tfinal=FINAL,
        deltaT=every,
        beta1=0.8,
        beta2=0.9,
        total_step=STEPS,
        target_modules=["proj"],
    )


def adapter_of(params):
    # PEFT divides by r + 1e-5.
    spec = adalora.Spec(rank=RANK, target_rank=TARGET, alpha=8 * RANK / (RANK + 1e-5))
    return oracle.trained(jaxpeft.init(jax.random.key(0), spec, jaxpeft.find(params)))


def test_adalora() -> None:
    params = oracle.base(LAYERS, 12, 18)
    adapter = adapter_of(params)
    ((_, ours),) = adapter.params.items()

    def fill(state):
        del state
        return {name_of(n, leaf): in_shape(leaf, ours[leaf][n]) for n in range(LAYERS) for leaf in LEAVES}

    oracle.assert_equal(oracle.merged_by_us(adapter, params), oracle.merged_by_peft(config_of(), params, fill))


@pytest.mark.parametrize("every", [1, 3])
def test_allocation_with_the_same_gradients(every) -> None:
    """Ten steps of gradient descent: averages, scores and gates agree after every one, the final ones included."""
    import torch

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = torch.nn.Linear(12, 18, bias=False)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(Layer() for _ in range(LAYERS))

    model = peft.get_peft_model(Model(), config_of(every))
    theirs = dict(model.named_parameters())
    adapter = adapter_of(oracle.base(LAYERS, 12, 18))
    ((group, _),) = adapter.params.items()
    settings = {"initial_steps": INITIAL, "final_steps": FINAL, "every": every, "beta1": 0.8, "beta2": 0.9}
    optimizer = allocate.for_spec(adapter.spec, optax.sgd(0.1), STEPS, **settings)
    ours, state = adapter.params, optimizer.init(adapter.params)
    for layer in range(LAYERS):
        for leaf in LEAVES:
            theirs[name_of(layer, leaf)].data = torch.tensor(np.array(in_shape(leaf, ours[group][leaf][layer])))
    pruned = 0
    for step in range(STEPS):
        keys = jax.random.split(jax.random.key(step), len(LEAVES))
        gradients = {
            leaf: jax.random.normal(key, ours[group][leaf].shape) for leaf, key in zip(LEAVES, keys, strict=True)
        }
        updates, state = optimizer.update({group: gradients}, state, ours)
        ours = optax.apply_updates(ours, updates)
        for layer in range(LAYERS):
            for leaf in LEAVES:
                parameter = theirs[name_of(layer, leaf)]
                parameter.grad = torch.tensor(np.array(in_shape(leaf, gradients[leaf][layer])))
                parameter.data -= 0.1 * parameter.grad
        model.base_model.update_and_allocate(step)
        rule = model.base_model.rankallocator
        for layer in range(LAYERS):
            for leaf in LEAVES:
                name = name_of(layer, leaf)
                expected = theirs[name].detach().numpy()
                np.testing.assert_allclose(in_shape(leaf, np.asarray(ours[group][leaf][layer])), expected, atol=1e-6)
                if step < STEPS - FINAL:
                    short = name.removeprefix("base_model.model.")
                    for kind, theirs_of in (("sensitivity", rule.exp_avg_ipt), ("uncertainty", rule.exp_avg_unc)):
                        found = in_shape(leaf, np.asarray(state.memory[kind][group][leaf][layer]))
                        np.testing.assert_allclose(found, theirs_of[short].numpy(), atol=1e-6)
        zeros = sum(int((theirs[name_of(layer, "gate")] == 0).sum()) for layer in range(LAYERS))
        assert zeros == int(jnp.sum(ours[group]["gate"] == 0))
        pruned = zeros
    assert pruned == LAYERS * (RANK - TARGET)
