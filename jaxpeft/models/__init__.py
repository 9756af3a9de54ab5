"""Small Flax reference models, loaders of real weights, and their way back into Hugging Face folders."""

from jaxpeft.models.architectures import ARCHITECTURES
from jaxpeft.models.config import REMAT_POLICIES, Config, RopeScaling
from jaxpeft.models.decoder import Decoder
from jaxpeft.models.encoder import Encoder
from jaxpeft.models.encoder_config import EncoderConfig
from jaxpeft.models.encoder_model import ENCODER_RULES, EncoderModel
from jaxpeft.models.encoder_model import random as random_encoder
from jaxpeft.models.language_model import DEFAULT_RULES, LanguageModel, random
from jaxpeft.models.loading import load
from jaxpeft.models.names import hf_name
from jaxpeft.models.pretrained import PACKAGED, pretrained
from jaxpeft.models.saving import save
from jaxpeft.models.shapes import abstract, shapes

__all__ = [
    "ARCHITECTURES",
    "DEFAULT_RULES",
    "ENCODER_RULES",
    "PACKAGED",
    "REMAT_POLICIES",
    "Config",
    "Decoder",
    "Encoder",
    "EncoderConfig",
    "EncoderModel",
    "LanguageModel",
    "RopeScaling",
    "abstract",
    "hf_name",
    "load",
    "pretrained",
    "random",
    "random_encoder",
    "save",
    "shapes",
]
