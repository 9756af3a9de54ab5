"""Small Flax reference models and loaders of real weights."""

from jaxpeft.models.config import REMAT_POLICIES, Config, RopeScaling
from jaxpeft.models.decoder import Decoder
from jaxpeft.models.language_model import LanguageModel, abstract, random
from jaxpeft.models.loading import DEFAULT_RULES, hf_name, load
from jaxpeft.models.pretrained import PACKAGED, pretrained

__all__ = [
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
]
