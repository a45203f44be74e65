"""Evaluation between stages: what is measured, how, and what follows for the next mixture."""
