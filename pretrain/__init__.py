"""Pretraining and further pretraining of BERT encoders in plain PyTorch; see README.md."""
