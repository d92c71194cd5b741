"""The one kind of projection that the model is made of."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

INIT_STD = 0.02  # of projections and embeddings, as in HF


class Linear(nn.Linear):
    """A projection without bias that computes in the dtype of its input."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INIT_STD)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))
