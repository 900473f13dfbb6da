"""One thread for every test: many threads on busy cores wait for one another, and a tiny network takes minutes."""

import os

if not os.path.exists("/dev/nvidiactl"):
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels run on the CPU; it reads this when PyTorch imports it

import torch

torch.set_num_threads(1)
