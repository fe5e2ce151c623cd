"""How much of an edit the finished picture still shows, in colour or in grain, against the picture without it.

Looks at both after the same post-processing, so that what JPEG or noise swallowed does not count. It is no detector: it
knows the picture without the edit, so what it does not see, no detector of pixels can.
"""

from __future__ import annotations

import cv2
import numpy as np

LEVEL = 1.0
"""One step of an 8-bit picture. Means over a window come out finer than that, but rounding, chroma subsampling and the
camera's own noise move them by as much in pictures that nobody touched."""
_WINDOW = 7
_GRAIN_WINDOW = 9
_GRAIN_SIGMA = 1.5
_MARGIN = 16


def visible_change(without: np.ndarray, edited: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """How strongly and where an edit shows.

    At each pixel the larger of two things: the difference of the colours averaged over 7x7 pixels, mean of the channels
    (averaged, since one patch of plain noise in place of another differs at every pixel and shows nothing), and the
    difference of the strength of the grain, the deviation from a Gaussian blur over 9x9 pixels.

    Args:
        without, edited: (H, W, 3) uint8 RGB, the finished picture without and with the edit.
        mask: (H, W) bool, at least one pixel.

    Returns:
        the mean over the mask in levels 0..255, and the share in [0, 1] of the mask where it is at least `LEVEL`.
    """
    left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
    rows = slice(max(top - _MARGIN, 0), top + height + _MARGIN)
    columns = slice(max(left - _MARGIN, 0), left + width + _MARGIN)
    first, second = (picture[rows, columns].astype(np.float32) for picture in (without, edited))
    colour = np.abs(cv2.blur(second - first, (_WINDOW, _WINDOW))).mean(axis=2)  # (h, w)
    shown = np.maximum(colour, np.abs(_grain(second) - _grain(first)))[mask[rows, columns]]
    return float(shown.mean()), float((shown >= LEVEL).mean())


def _grain(picture: np.ndarray) -> np.ndarray:
    """(H, W) float32 local standard deviation of the brightness around a blurred copy, in levels."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    rest = grey - cv2.GaussianBlur(grey, (0, 0), _GRAIN_SIGMA)
    variance = cv2.blur(rest * rest, (_GRAIN_WINDOW, _GRAIN_WINDOW))  # a running sum: below 0 by rounding now and then
    return np.sqrt(np.maximum(variance, 0))
