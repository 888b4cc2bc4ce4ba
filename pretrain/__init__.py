"""Pretraining and further pretraining of BERT encoders in plain PyTorch; see README.md."""
import os

# Threads that wait sleep instead of spinning: on a busy machine spinning threads held each other up, and a forward and
# backward pass took 1,170 ms instead of 130 ms (2 cores, load 5). Must be set before torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
