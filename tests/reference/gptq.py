"""GPTQ for one layer as the paper writes it: one row, one weight at a time, in NumPy and float64.

For column j, with H_F the Hessian of the weights not yet rounded: q_j = round(w_j), and all others move by -(w_j - q_j) / [H_F^-1]_jj times
column j of H_F^-1; then j leaves F, which is Gaussian elimination of its row and column from H_F^-1.
Grids are lists of what every weight may become; the closest wins.
"""

import numpy as np

Array = np.ndarray


def gptq(
    weight: Array, hessian: Array, grids: Array, *, places: Array | None = None, damping: float = 0.01, order: list[int] | None = None
) -> Array:
    """Return the rounded weight `(rows, columns)`.

    `grids` is `(rows, columns, values)`: what each weight may become; `places`, of the same shape, is where those values lie when the
    closest is looked for, if the runtime rounds them once more. `order` is the order of the columns.
    """
    places = grids if places is None else places
    rows, columns = weight.shape
    order = list(range(columns)) if order is None else order
    damped = hessian + damping * np.mean(np.diag(hessian)) * np.eye(columns)
    result = np.zeros_like(weight)
    for r in range(rows):
        w, inverse = weight[r].copy(), np.linalg.inv(damped)
        for j in order:
            result[r, j] = grids[r, j, np.argmin(np.abs(places[r, j] - w[j]))]
            w -= (w[j] - result[r, j]) / inverse[j, j] * inverse[:, j]
            inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
            inverse[j, :] = inverse[:, j] = 0  # j has left; what is left is rounding error
            inverse[j, j] = 1
    return result
