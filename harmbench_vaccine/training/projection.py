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


def projected_update(aligned: Adapter, adapter: Adapter, module: str, projector: Projector) -> tuple[Tensor, float]:
    """Project the update B A of one module onto the alignment update.

    Args:
        aligned: The adapter of the alignment stage.
        adapter: The adapter of the user stage.
        module: Name of the module.
        projector: The formula of C.

    Returns:
        C B (outputs x rank), and the cosine of C B A and B A; 0 if either is 0.
    """
    a, b = adapter.factors[module]
    directions, weights = alignment_projector(aligned, module, projector)
    projected = directions @ (weights.unsqueeze(1) * (directions.T @ b))
    # the default eps, 1e-8, exceeds the norm of C B A where both updates are small
    cosine = torch.cosine_similarity((projected @ a).flatten(), (b @ a).flatten(), dim=0, eps=1e-30)
    return projected, float(cosine)
