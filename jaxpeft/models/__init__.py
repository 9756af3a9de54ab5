"""Small Flax reference models and loaders of real weights."""
