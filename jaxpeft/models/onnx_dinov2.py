"""How does the DINOv2 backbone inside an exported ONNX graph become a folder in the Hugging Face format?"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

_PREFIX = "backbone."
_CONFIG = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "num_channels": 3,
    "qkv_bias": True,
    "layerscale_value": 1.0,
    "use_swiglu_ffn": False,
}


def onnx_to_hf(source: str | os.PathLike, folder: str | os.PathLike) -> None:
    """Writes ``config.json`` and ``model.safetensors`` of the `Dinov2Model` below ``backbone.`` in an ONNX graph.

    The exporter folded constants: a linear's weight is anonymous and transposed, and is known by the bias that its
    product is added to; the positions of the class token and of the patches stand apart.

    Args:
      source: the ONNX file.
      folder: an existing folder.

    Raises:
      ImportError: the package ``onnx`` is missing.
      ValueError: the graph is another one.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise ImportError("reading ONNX weights needs the extra `vision`: pip install 'jaxpeft[vision]'") from None
    from safetensors.numpy import save_file

    graph = onnx.load(os.fspath(source)).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    tensors = {name.removeprefix(_PREFIX): array for name, array in arrays.items() if name.startswith(_PREFIX)}
    products = {
        node.output[0]: arrays[name]
        for node in graph.node
        if node.op_type == "MatMul"
        for name in node.input
        if name in arrays and arrays[name].ndim == 2
    }
    for node in graph.node:
        if node.op_type != "Add":
            continue
        bias = next((name for name in node.input if name.startswith(_PREFIX) and name.endswith(".bias")), None)
        weight = next((products[name] for name in node.input if name in products), None)
        if bias is not None and weight is not None:
            tensors[bias.removeprefix(_PREFIX).removesuffix("bias") + "weight"] = weight.T
    if "embeddings.cls_token" not in tensors:
        raise ValueError(f"{source}: no DINOv2 backbone in this graph (no array {_PREFIX}embeddings.cls_token)")
    hidden = tensors["embeddings.cls_token"].shape[-1]
    folded = [array for name, array in arrays.items() if "::" in name and array.ndim == 3 and array.shape[-1] == hidden]
    parts = sorted((array for array in folded if len(array) == 1), key=lambda array: array.shape[1])
    if len(parts) != 2 or parts[0].shape[1] != 1:
        raise ValueError(f"{source}: expected the class token's position and the patches', found {len(parts)} arrays")
    tensors["embeddings.position_embeddings"] = np.concatenate(parts, axis=1)

    layers = {name.split(".")[2] for name in tensors if name.startswith("encoder.layer.")}
    patch = tensors["embeddings.patch_embeddings.projection.weight"].shape[-1]
    config = _CONFIG | {
        "hidden_size": hidden,
        "num_hidden_layers": len(layers),
        "num_attention_heads": hidden // 64,  # in every DINOv2
        "patch_size": patch,
        "image_size": patch * round(parts[1].shape[1] ** 0.5),
    }
    contiguous = {name: np.ascontiguousarray(array, np.float32) for name, array in tensors.items()}
    save_file(contiguous, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    (Path(folder) / "config.json").write_text(json.dumps(config, indent=2))
