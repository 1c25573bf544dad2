"""The subspace of the alignment update, from the factors of its adapter: no matrix of outputs x outputs is formed."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .adapters import Adapter

Projector = Literal["paper", "exact"]
"""C of an update V. `paper`: V V^T / ||V||_F, the formula of Safe LoRA and AsFT; it is not a true projector, because
its eigenvalues are sigma_i(V)^2 / ||V||_F. `exact`: V (V^T V)^+ V^T, the projector onto the columns of V."""


def left_singular_vectors(adapter: Adapter, module: str) -> tuple[Tensor, Tensor]:
    """Compute the left singular vectors and the singular values of the update of one module.

    Returns:
        The vectors (outputs x rank) and the values (rank), the largest first; numbers that are 0 up to rounding are
        left out.
    """
    a, b = adapter.factors[module]
    basis, rest = torch.linalg.qr(adapter.scale * b)
    rotation, values, _ = torch.linalg.svd(rest @ a, full_matrices=False)
    nonzero = values > 1e-6 * values.max()
    return (basis @ rotation)[:, nonzero], values[nonzero]


def alignment_projector(aligned: Adapter, module: str, projector: Projector) -> tuple[Tensor, Tensor]:
    """Compute the factors of C = U diag(c) U^T for the alignment update V of one module.

    Args:
        aligned: The adapter of the alignment stage.
        module: Name of the module.
        projector: The formula of C.

    Returns:
        U (outputs x rank of V) and c (rank of V).
    """
    directions, values = left_singular_vectors(aligned, module)
    weights = values.square() / torch.linalg.vector_norm(values)
    return directions, weights if projector == "paper" else torch.ones_like(values)
