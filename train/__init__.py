"""The application: fine-tune a language model with an adapter, `python -m train --help`."""
