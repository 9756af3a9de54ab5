"""Small Flax reference models and loaders of real weights."""

from jaxpeft.models.architectures import ARCHITECTURES
from jaxpeft.models.config import REMAT_POLICIES, Config, RopeScaling
from jaxpeft.models.decoder import Decoder
from jaxpeft.models.language_model import DEFAULT_RULES, LanguageModel, abstract, random, shapes
from jaxpeft.models.loading import hf_name, load
from jaxpeft.models.pretrained import PACKAGED, pretrained

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
    "shapes",
]
