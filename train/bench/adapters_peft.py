"""PEFT's rows of the adapters benchmark: LoRA alone, and its mixed batches."""

import time
from typing import Any

from train.bench import step_torch
from train.bench.step_tokens import tokens as random_tokens
from train.bench.workers import Work


def work(folder: str, rows: int, prompt: int, new: int, adapters: int) -> Work:
    """As `adapters_jaxpeft.work`, of LoRA r=16; PEFT trains one adapter of a batch, so training is left out."""
    import torch
    from peft import LoraConfig, get_peft_model

    base = step_torch.read(folder)
    settings = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    names = [f"adapter{number}" for number in range(adapters)]
    model: Any = get_peft_model(base, settings, adapter_name=names[0]).eval()
    for name in names[1:]:
        model.add_adapter(name, settings)
    model.set_adapter(names[0])
    tokens = torch.from_numpy(random_tokens(base.config.vocab_size, rows, prompt)[0]).long()
    chosen = {"adapter_names": names} if adapters > 1 else {}

    @torch.no_grad()
    def run() -> dict[str, float]:
        start = time.perf_counter()
        out = model(input_ids=tokens, use_cache=True, logits_to_keep=1, **chosen)
        token = out.logits[:, -1:].argmax(-1)
        middle = time.perf_counter()
        for _ in range(new - 1):
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True, **chosen)
            token = out.logits[:, -1:].argmax(-1)
        return {"prefill": middle - start, "decode": time.perf_counter() - middle}

    size = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if f".{names[0]}." in name)
    return Work(run, {"adapter_bytes": size}, steady=True)
