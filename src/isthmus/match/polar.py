"""The polar factor: the rotation nearest to a matrix."""

import torch
from jaxtyping import Float
from torch import Tensor

# Share of a matrix's norm that is added to it before it is decomposed, so that its null space has a basis.
STEADY = 1e-9


# Units whose variance is below this share of the largest never vary.
DEAD_VARIANCE_SHARE = 1e-12


def polar_factor(
    matrix: Float[Tensor, "rows rows"], own: Float[Tensor, " rows"], other: Float[Tensor, " rows"]
) -> tuple[Float[Tensor, "rows rows"], Float[Tensor, " rows"]]:
    """U Vᵀ and the singular values; a singular matrix is completed so that dead units face dead units, one by one.

    The mean of two units that never fire never fires either; a rotation among such units would wake them.

    Args:
        matrix: From the second model's units (columns) to the first's (rows).
        own: Variances of the first model's units.
        other: Variances of the second model's units.
    """
    orders = [torch.argsort((v <= DEAD_VARIANCE_SHARE * v.max()).int(), stable=True) for v in (own, other)]
    facing = torch.zeros_like(matrix)
    facing[orders[0], orders[1]] = 1
    left, values, right = torch.linalg.svd(matrix + STEADY * torch.linalg.matrix_norm(matrix, ord="fro") * facing)
    return left @ right, values
