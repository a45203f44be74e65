"""Training recipes for SmolLM2 on Nanotron: what to train on, when, and proof that it happened."""
