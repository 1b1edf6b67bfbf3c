"""What a measured error says about the true one."""

import math


def wilson(error: float, images: int) -> tuple[float, float]:
    """The 95 % Wilson interval, in %, of an error in % measured on so many images."""
    z, p = 1.959964, error / 100
    centre = p + z * z / (2 * images)
    half = z * math.sqrt(p * (1 - p) / images + z * z / (4 * images * images))
    scale = 100 / (1 + z * z / images)
    return max(0.0, scale * (centre - half)), min(100.0, scale * (centre + half))
