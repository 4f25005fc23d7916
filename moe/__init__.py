"""Mixture-of-Experts language models in PyTorch. Importing this loads nothing: import what you use from its modules."""

__version__ = "0.1.0"  # stated here alone: setup.py reads it
