"""What does `serve` serve? The model, the template and the adapters that its options name."""

import argparse
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

from jaxpeft.models import LanguageModel
from train import config as configuration
from train import job, serve
from train.config import Config, ConfigError
from train.engine import Engine
from train.resident import Residents
from train.template import Template

# What a model alone leaves open; of it only `model` and `data.template` are used.
_CONFIG = """
model: {name: NAME}
method: {name: lora, rank: 1}
data: {source: synthetic}
train: {steps: 1}
output: {folder: unused}
"""


def config(name: str, overrides: list[str]) -> Config:
    """The configuration that a run folder, a YAML file or the name of a model stands for."""
    path = Path(name)
    if (path / "config.yaml").exists():
        return configuration.load(path / "config.yaml", overrides)
    if path.suffix in (".yaml", ".yml"):
        return configuration.load(path, overrides)
    return configuration.parse(_CONFIG.replace("NAME", json.dumps(name)), overrides, "serve")


def service(options: argparse.Namespace) -> serve.Service:
    """Loads the model, to one device, and the adapters.

    Raises:
      ConfigError: an option does not fit.
    """
    parsed = config(options.model, options.overrides)
    job.check_generation(parsed)
    folder = None if options.adapters is None else Path(options.adapters)
    if folder is not None and not folder.is_dir():
        raise ConfigError([f"--adapters: {folder} is no folder"], "serve")
    for option in ("timeout", "grace"):
        if not 0 < getattr(options, option) < math.inf:
            raise ConfigError([f"--{option}: expected more than 0 seconds, found {getattr(options, option)}"], "serve")
    keys = api_keys(options.api_key)
    # A path's own name also where it is given as `.`; the name of a hub's model stays as it is.
    path = Path(parsed.model.name)
    name = options.name or (path.resolve() if path.exists() else path).name
    model = _model(parsed)
    template = Template(model.tokenizer, parsed.data.template, model.config.vocab_size)
    try:
        engine = Engine(
            model,
            rows=options.rows,
            max_length=options.max_length,
            end_ids=tuple(sorted(template.end_ids)),
            tokens_per_call=options.tokens_per_call,
            max_queue=options.max_queue,
        )
    except ValueError as error:
        raise ConfigError([str(error)], "serve") from None
    residents = None
    if folder is not None:
        residents = Residents(folder, engine.base, tokenizer=template.fingerprint, check=engine.check, reserved=(name,))
        residents.scan()
    return serve.Service(engine, template, residents, name, keys, options.timeout)


def api_keys(given: Sequence[str] | None) -> list[str]:
    """The keys of the command line and of ``JAXPEFT_API_KEY``, which other users of the machine do not see.

    Raises:
      ConfigError: one is blank, as of a variable that is not set.
    """
    keys = [*(given or ()), *filter(None, os.environ.get("JAXPEFT_API_KEY", "").split(","))]
    if any(not key.strip() for key in keys):
        raise ConfigError(["--api-key: a key is blank, which would keep nobody out"], "serve")
    return [key.strip() for key in keys]


def _model(parsed: Config) -> LanguageModel:
    model = job.pretrained(parsed, mesh=None)
    if not isinstance(model, LanguageModel):
        raise ConfigError([f"model.name: {parsed.model.name} is an encoder, which writes no text"], "serve")
    return model
