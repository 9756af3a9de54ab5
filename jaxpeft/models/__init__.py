"""Small Flax reference models, loaders of real weights, and their way back into Hugging Face folders."""

from jaxpeft.models.architectures import ARCHITECTURES
from jaxpeft.models.config import REMAT_POLICIES, Config, RopeScaling
from jaxpeft.models.decoder import Decoder
from jaxpeft.models.language_model import DEFAULT_RULES, LanguageModel, abstract, random, shapes
from jaxpeft.models.loading import hf_name, load
from jaxpeft.models.pretrained import PACKAGED, pretrained
from jaxpeft.models.saving import save

__all__ = [
    "ARCHITECTURES",
    "DEFAULT_RULES",
    "PACKAGED",
    "REMAT_POLICIES",
    "Config",
    "Decoder",
    "LanguageModel",
    "RopeScaling",
    "abstract",
    "hf_name",
    "load",
    "pretrained",
    "random",
    "save",
    "shapes",
]
