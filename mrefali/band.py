"""The band of frequencies that the alignment looks at; the averages know nothing of it.

Only the references are filtered: the correlation of a filtered reference with a particle is that of the reference with
the filtered particle. Arrays in, arrays out. Imports reference only.
"""

from dataclasses import dataclass

import numpy as np

from mrefali.reference import TanhFilter, low_pass

#: Fall-off of both filters, relative to their cutoff.
FALLOFF = 0.2


@dataclass(frozen=True)
class Band:
    """The frequencies that count, in 1/px.

    Attributes
    ----------
    lowpass : float or None
        Cutoff of the first iteration; it rises evenly, and the last of ``n_iterations`` has no low-pass.
    highpass : float or None
        Cutoff below which nothing counts, in every iteration.
    n_iterations : int
        At most.
    """

    lowpass: float | None = None
    highpass: float | None = None
    n_iterations: int = 1

    def lowpass_at(self, number):
        """Cutoff of the low-pass in iteration ``number``, None where there is none; of a single iteration the first."""
        if self.lowpass is None or 0 < self.n_iterations - 1 <= number:
            return None
        return self.lowpass + (0.5 - self.lowpass) * number / max(1, self.n_iterations - 1)

    def filtered(self, references, number, inside):
        """``references`` (n_references, n, n) float32, as the alignment of iteration ``number`` takes them.

        The high-pass takes away any plane within ``inside`` (n, n) bool, where the alignment compares, too. A gradient
        ends at the edges of an image and so has all frequencies, and to one of the particle even a reference without
        low frequencies would correlate, as a disc is cut out of it.
        """
        lowpass = self.lowpass_at(number)
        if lowpass is not None:
            references = _filtered(references, TanhFilter(lowpass, FALLOFF))
        if self.highpass is not None:
            references = _without_plane(references, inside)
            references = references - _filtered(references, TanhFilter(self.highpass, FALLOFF))
            references = _without_plane(references, inside)
        return references


def _without_plane(references, inside):
    """Minus the plane that fits each best within ``inside``."""
    y, x = np.indices(inside.shape) - inside.shape[0] // 2
    planes = np.stack([np.ones(inside.shape), x, y])
    fitted, *_ = np.linalg.lstsq(planes[:, inside].T, references[:, inside].T.astype(np.float64), rcond=None)
    return (references - np.einsum("pr,pyx->ryx", fitted, planes)).astype(np.float32)


def _filtered(references, tanh_filter):
    return np.stack([low_pass(image.astype(np.float64), tanh_filter) for image in references]).astype(np.float32)
