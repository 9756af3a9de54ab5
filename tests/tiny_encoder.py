"""Random encoders of some thousand parameters, of text with a tokenizer and of images, as Hugging Face writes them."""

import dataclasses
import json

import jax
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from jaxpeft import models as reference
from jaxpeft.models.names import encoder_name
from jaxpeft.sites import flatten

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
FIELDS = {
    "bert": {"intermediate_size": 48, "vocab_size": 50, "max_position_embeddings": 20, "type_vocab_size": 2},
    "roberta": {
        "intermediate_size": 48,
        "vocab_size": 50,
        "max_position_embeddings": 22,
        "type_vocab_size": 1,
        "pad_token_id": 1,
    },
    "distilbert": {"hidden_dim": 48, "vocab_size": 50, "max_position_embeddings": 20},
    "vit": {"intermediate_size": 48, "image_size": 16, "patch_size": 4},
    "dinov2": {"mlp_ratio": 2, "image_size": 16, "patch_size": 4},
}


def config_json(folder, family, **fields):
    folder.mkdir(exist_ok=True, parents=True)
    names = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
    sizes = {names[k] if family == "distilbert" else k: v for k, v in SIZES.items()}
    (folder / "config.json").write_text(json.dumps({"model_type": family} | sizes | FIELDS[family] | fields))


def made(folder, family, **fields):
    """A random model as its folder describes it, all its parameters drawn."""
    config_json(folder, family, **fields)
    shapes = reference.load(folder, dtype="float32", weights=False, tokenizer=False)
    model = reference.random_encoder(shapes.config, jax.random.key(0))
    random = np.random.default_rng(0)
    return dataclasses.replace(
        model, params=jax.tree.map(lambda leaf: leaf + 0.1 * random.normal(size=leaf.shape).astype("f"), model.params)
    )


def tensors(model, prefix=""):
    """The parameters under Hugging Face's names and in torch's layout."""
    found = {}
    for path, leaf in flatten(model.params).items():
        leaf, name = np.asarray(leaf), prefix + encoder_name(path, model.config)
        for layer in range(len(leaf)) if "{}" in name else [None]:
            tensor = leaf if layer is None else leaf[layer]
            tensor = tensor.T if path.endswith("/kernel") else tensor
            found[name.format(layer)] = np.ascontiguousarray(tensor)
    return found


def tokenizer():
    """Words and digits, apart by spaces; [CLS] before and [SEP] after each text, as BERT's."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *map(str, range(10)), "good", "bad", "film", "a"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def save(folder, family, **fields):
    """Writes config.json, model.safetensors and, for text, the tokenizer's files."""
    model = made(folder, family, **fields)
    save_file(tensors(model), folder / "model.safetensors", metadata={"format": "pt"})
    if not model.config.is_vision:
        tokenizer().save_pretrained(folder)
    return folder
