"""Small Flax reference models and loaders of real weights."""

from jaxpeft.models.config import Config, RopeScaling
from jaxpeft.models.decoder import Decoder
from jaxpeft.models.language_model import LanguageModel, abstract, random

__all__ = ["Config", "Decoder", "LanguageModel", "RopeScaling", "abstract", "random"]
