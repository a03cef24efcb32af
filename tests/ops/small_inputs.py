"""Small sound tensors, and words of errors, that the cases of several operators share."""

import torch

FEATURES = torch.zeros(2, 4, 3, 3)
LABELS = torch.zeros(2, 6, 6, dtype=torch.int64)
PROTOTYPES = torch.zeros(3, 4)
CAMS = [torch.zeros(2, 3, 4, 4)]
PRESENT = torch.ones(2, 3)
META = torch.device("meta")

FLOATS = "float16, bfloat16, float32 or float64"
CELLS = "features must be of at least 1×1 cells where there are label pixels"
