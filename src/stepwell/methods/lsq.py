"""LSQ: rounded forward pass, straight-through gradient inside the grid, and a learned scale for every block.

Source: Esser et al., "Learned Step Size Quantization" (arXiv:1902.08153). Differs: see `learned`, which gives such scales to every method;
also the start from a search where the authors take `2 mean |w| / sqrt(q)`.
"""

from stepwell.methods.base import Method
from stepwell.methods.learned import learned
from stepwell.methods.ste import ste
from stepwell.quantizers import Quantizer


def lsq(quantizer: Quantizer, *, rate: float = 1e-2) -> Method:
    """Return straight-through training with learned scales.

    Args:
        quantizer: the grid; its own scale rule is not used.
        rate: relative step of a scale while the optimizer's learning rate is at its largest so far.

    Raises:
        TypeError: `quantizer` is no Quantizer.
        ValueError: a grid that has no scale to learn, or a rate out of range.
    """
    return learned(ste(quantizer), rate=rate)._replace(name="lsq")
