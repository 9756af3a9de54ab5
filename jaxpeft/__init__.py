"""Parameter-efficient fine-tuning for JAX and Flax by shared and structured updates."""
