"""Trained models in use: loading, generation, perplexity. Commands: ``lightning-generate``, ``lightning-perplexity``."""
