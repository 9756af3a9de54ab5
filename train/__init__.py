"""The application: fine-tune, evaluate, generate and report from one YAML file."""
