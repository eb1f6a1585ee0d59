"""Two threads at most: the models are tiny, and other tests run beside these."""

import torch

torch.set_num_threads(min(2, torch.get_num_threads()))
