"""Trained models in use: loading, ``lightning-generate``, ``lightning-perplexity``, ``lightning-serve``."""
