"""The rows of the step benchmark in torch: the frozen bound, and LoRA by Hugging Face PEFT. Without JAX."""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from train.bench.step_tokens import tokens
from train.bench.workers import Work, cores


def frozen(folder: str, batch: int, length: int, compile: bool) -> Work:
    """Forward pass and gradient of the activations down to the first layer, that of its first norm scale."""
    model = read(folder)
    model.requires_grad_(False)
    scale = model.model.layers[0].input_layernorm.weight
    scale.requires_grad_(True)
    return _work(model, [scale], None, (batch, length), trained=0, compile=compile)


def lora(folder: str, batch: int, length: int, rank: int, compile: bool) -> Work:
    """PEFT's LoRA on every linear weight but the head, alpha equal to the rank."""
    import peft
    import torch

    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", lora_dropout=0.0)
    model = peft.get_peft_model(read(folder), config)
    params = [param for param in model.parameters() if param.requires_grad]
    try:
        optimizer, kind = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0, fused=True), "fused"
    except RuntimeError:  # not on this device
        optimizer, kind = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0, foreach=True), "foreach"
    trained = sum(param.numel() for param in params)
    made = _work(model, params, optimizer, (batch, length), trained=trained, compile=compile)
    return Work(made.run, {**made.facts, "settings": f"{made.facts['settings']}, {kind} AdamW"}, steady=True)


def read(folder: str) -> Any:
    """The model, with torch set for this machine."""
    import torch
    import transformers

    torch.set_num_threads(cores())
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return made.train()


def _work(
    model: Any, params: Sequence[Any], optimizer: Any, shape: tuple[int, int], *, trained: int, compile: bool
) -> Work:
    """A step, eager or by `torch.compile`, whichever is faster; a few were taken."""
    import torch

    read, targets = (torch.from_numpy(array).long() for array in tokens(model.config.vocab_size, *shape))

    def step(forward: Callable) -> float:
        # As they are rolled, the targets are not to be shifted again.
        loss = forward(input_ids=read, labels=targets, shift_labels=targets, use_cache=False).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        for param in params:
            param.grad = None
        return loss.item()

    first_loss, compile_seconds, seconds = _tried(lambda: step(model))
    facts = {"trained": trained, "gflop": _gflop(lambda: step(model)), "first_loss": first_loss}
    chosen, mode = model, f"eager ({seconds:.3g} s a step)"
    if compile:
        compiled = torch.compile(model)
        try:
            _, compiling, fast = _tried(lambda: step(compiled))
        except Exception as error:  # whatever the compiler raises, the eager model is there
            mode += f", torch.compile failed ({type(error).__name__})"
        else:
            mode += f", torch.compile {fast:.3g} s"
            if fast < seconds:
                chosen, compile_seconds, mode = compiled, compiling, f"torch.compile ({fast:.3g} s a step), {mode}"
    settings = f"{mode}; {torch.get_num_threads()} threads, sdpa attention"
    if policy := os.environ.get("OMP_WAIT_POLICY"):
        settings += f", OMP_WAIT_POLICY={policy}"
    return Work(lambda: step(chosen), {**facts, "compile_seconds": compile_seconds, "settings": settings}, steady=True)


def _tried(step: Callable[[], float]) -> tuple[float, float, float]:
    """The first loss, by how many seconds the first step took longer, and the seconds of the fastest of three more."""
    loss, first = _timed(step)
    seconds = min(_timed(step)[1] for _ in range(3))
    return loss, max(first - seconds, 0.0), seconds


def _timed(step: Callable[[], float]) -> tuple[float, float]:
    start = time.perf_counter()
    loss = step()
    return loss, time.perf_counter() - start


def _gflop(run: Callable[[], Any]) -> float:
    """As torch counts: products, and attention whole, although it is causal."""
    import torch
    from torch.utils import flop_counter

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return flop_counter.sdpa_flop_count(query, key, value)

    def backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return flop_counter.sdpa_backward_flop_count(gradient, query, key, value)

    attention = {  # The CPU's own, which is not in torch's table.
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: forward,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with flop_counter.FlopCounterMode(display=False, custom_mapping=attention) as counter:
        run()
    return counter.get_total_flops() / 1e9
