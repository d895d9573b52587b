"""What every test runs under."""

import torch

# The models are tiny: a second thread costs more than it does, and tests run side by side.
torch.set_num_threads(1)
