"""Pretraining and further pretraining of BERT encoders in plain PyTorch; see README.md."""

__version__ = "0.1.0"  # the only place; setup.cfg reads it
