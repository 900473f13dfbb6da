"""One thread for every test: many threads on busy cores wait for one another, and a tiny network takes minutes."""

import torch

torch.set_num_threads(1)
