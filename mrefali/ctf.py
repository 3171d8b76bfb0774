"""The contrast transfer function: header values, CTF, CTF^2, and what is done with them (SPEC section 7).

Arrays and header values in, arrays out: this module knows no file and no rank. Imports errors only.

A spatial frequency is counted in Fourier pixels, 1 / (n pixel_size_A) each, on the grid of an n-pixel ``rfft2``;
the row and the column at n/2 count as positive.
"""

from functools import lru_cache

import numpy as np
import scipy.fft

from mrefali.errors import InputError

#: One CTF an image, in the order and the units of an EMAN2 string: positive defocus is underfocus, dfdiff is the
#: difference between the two principal defoci, the B-factor damps amplitudes by exp(-B k^2 / 4). A phase plate's shift,
#: which the string has no place for, adds to the phase.
CTF_PARAMETERS = np.dtype([(name, "f8") for name in (
    "defocus_um", "dfdiff_um", "dfang_deg", "bfactor_A2", "ampcont_percent", "voltage_kV", "cs_mm", "pixel_size_A",
    "phase_shift_deg")])

#: Smallest and largest value that makes sense. No B-factor below 0 means that a CTF never exceeds 1.
LIMITS = {"defocus_um": (-100, 100), "dfdiff_um": (-100, 100), "dfang_deg": (-360, 360), "bfactor_A2": (0, 1e5),
          "ampcont_percent": (0, 100), "voltage_kV": (10, 3000), "cs_mm": (-100, 100), "pixel_size_A": (0.01, 1000),
          "phase_shift_deg": (-360, 360)}

#: Mean CTF^2 of particles below which little is known of them; it is about 0.5, but at zeros that all have in common.
LEAST_CTF_SQ = 0.1

#: Kernels of ``CtfKernels`` held at most.
KERNEL_BYTES = 64 << 20

#: Spectra transformed at a time: little enough to stay in a core's cache.
CHUNK_BYTES = 512 << 10


# --- header values


def parse_ctf(text):
    """The CTF parameters of a header attribute ``ctf``.

    Parameters
    ----------
    text : str
        ``E`` and at least eight numbers (EMAN2, see ``CTF_PARAMETERS``), the first right after the letter; the
        background and SNR curves that may follow are not used. Or ``O`` and the eleven numbers of EMAN1: defocus,
        B-factor, amplitude, amplitude contrast, four of noise, voltage, Cs, pixel size. There underfocus is
        negative, amplitudes fall by exp(-B k^2), so B is a quarter of EMAN2's, and there is no astigmatism. EMAN1
        gives amplitude contrast as a fraction; a number above 1 can be none and is taken as per cent. Amplitude and
        noise are not used.

    Returns
    -------
    () CTF_PARAMETERS

    Raises
    ------
    InputError
        Names the field and its limits; the caller knows the image.
    """
    kind, numbers = text[:1], text[1:].split()
    if kind == "E" and len(numbers) >= 8:
        values = _floats(numbers[:8], text)
    elif kind == "O" and len(numbers) == 11:
        defocus, bfactor, _, ampcont, *_, voltage, cs, pixel_size = _floats(numbers, text)
        percent = 100 * ampcont if ampcont <= 1 else ampcont
        values = -defocus, 0.0, 0.0, 4 * bfactor, percent, voltage, cs, pixel_size
    else:
        raise InputError(f"ctf={_shown(text)} is not understood: give E and at least 8 numbers (EMAN2), or O and 11 "
                         f"(EMAN1)")
    parameters = np.array((*values, 0.0), CTF_PARAMETERS)
    check_ctf(parameters)
    return parameters


def _floats(numbers, text):
    try:
        return [float(number) for number in numbers]
    except ValueError:
        raise InputError(f"ctf={_shown(text)} is not understood: all that follows the letter must be "
                         f"numbers") from None


def _shown(text):
    """``text`` in quotes, cut where it is too long for one line of a message."""
    return repr(text if len(text) <= 80 else text[:77] + "...")


def check_ctf(parameters):
    """Raise InputError, naming the field, if a value of ``() CTF_PARAMETERS`` makes no sense."""
    for (name, (low, high)), value in zip(LIMITS.items(), parameters.item(), strict=True):
        if not low <= value <= high:  # NaN fails too
            raise InputError(f"ctf: {name}={value:.6g} makes no sense: {low:g} to {high:g} is allowed; "
                             f"correct the header, or leave --CTF out")


def format_ctf(parameters):
    """The EMAN2 string of ``() CTF_PARAMETERS``, without background and SNR curves.

    A phase shift becomes part of the amplitude contrast, which stands for a phase of its own.

    Raises
    ------
    InputError
        If the two phases together are not within 0 to 90 degrees, which no amplitude contrast stands for.
    """
    *values, phase_shift = parameters.item()
    if phase_shift:
        phase = np.rad2deg(np.arcsin(parameters["ampcont_percent"] / 100)) + phase_shift
        if not 0 <= phase <= 90:
            raise InputError(f"ctf: phase_shift_deg={phase_shift:.6g} with ampcont_percent="
                             f"{parameters['ampcont_percent']:.6g} cannot be held by EMAN2's ctf: together they may "
                             f"come to 0 to 90 degrees, not {phase:.4g}")
        values[CTF_PARAMETERS.names.index("ampcont_percent")] = 100 * np.sin(np.deg2rad(phase))
    return "E" + " ".join(f"{value:.10g}" for value in values) + " 0 0 0"


# --- the functions


def ctf(parameters, n):
    """The CTF, astigmatic, on the rfft2 grid of an n-pixel box.

    Parameters
    ----------
    parameters : () CTF_PARAMETERS
    n : int, px

    Returns
    -------
    (n, n // 2 + 1) float64
    """
    phase, envelope = _phase_and_envelope(parameters, n)
    return np.sin(phase) * envelope


def _phase_and_envelope(parameters, n):
    """Phase in radians and envelope of :func:`ctf`, (n, n // 2 + 1) float64 each."""
    p = parameters
    step = 1 / (n * p["pixel_size_A"])
    kx = step * np.arange(n // 2 + 1)
    ky = step * np.abs(np.fft.fftfreq(n, 1 / n))[:, None]
    ky[n // 2 + 1:] *= -1
    twice = 2 * np.deg2rad(p["dfang_deg"])
    across, along = p["dfdiff_um"] / 2 * np.sin(twice), p["dfdiff_um"] * np.cos(twice)
    # dz k^2 as a quadratic form in kx, ky: the azimuth, and its sine at each pixel, are never needed
    defocused = (p["defocus_um"] - across) * kx**2 + (p["defocus_um"] + across) * ky**2 - along * ky * kx
    phase = _phase(p, kx**2 + ky**2, defocused)
    quarter = p["bfactor_A2"] / 4
    return phase, np.exp(-quarter * kx**2) * np.exp(-quarter * ky**2)


def _phase(parameters, k2, defocused):
    """Phase in radians at squared frequency ``k2`` in 1/A^2; ``defocused`` is defocus in um times ``k2``."""
    wavelength = wavelength_A(parameters["voltage_kV"])
    spherical = parameters["cs_mm"] * (0.5e7 * wavelength**2)
    constant = np.arcsin(parameters["ampcont_percent"] / 100) + np.deg2rad(parameters["phase_shift_deg"])
    return np.pi * wavelength * (1e4 * defocused - spherical * k2**2) + constant


def wavelength_A(voltage_kV):
    """Wavelength in Angstrom of electrons of ``voltage_kV``."""
    return 12.398 / np.sqrt(voltage_kV * (1022 + voltage_kV))


def n_radii(n):
    """Number of whole Fourier pixels that a table needs to reach the corner of an n-pixel box's grid."""
    return int(np.hypot(n // 2, n // 2)) + 2


def ctf_sq(parameters, n):
    """CTF^2 at the mean defocus at Fourier pixels 0, 1, 2, ..., the weight of a particle in the Wiener division.

    Tables of particles may be added: :func:`wiener_divide` is linear between the Fourier pixels of what it makes of
    the sum.

    Parameters
    ----------
    parameters : (...) CTF_PARAMETERS
    n : int, px

    Returns
    -------
    (..., n_radii) float64
        Between 0 and 1.
    """
    return ctf_sq_at(np.asarray(parameters)[..., None], np.arange(n_radii(n)), n)


def ctf_sq_at(parameters, radius, n):
    """CTF^2 at the mean defocus, at any ``radius`` in Fourier pixels of images of n x n px; shapes are broadcast."""
    k2 = (radius / (n * parameters["pixel_size_A"])) ** 2
    phase = _phase(parameters, k2, parameters["defocus_um"] * k2)
    return (np.sin(phase) * np.exp(-parameters["bfactor_A2"] / 4 * k2)) ** 2


def wiener_divide(sums, ctf_sq_sum, snr):
    """Sums of premultiplied particles, divided in Fourier space by (sum of CTF^2 + 1/snr).

    The quotient 1 / (sum + 1/snr), not the sum, is linear between whole Fourier pixels.

    Parameters
    ----------
    sums : (n, n) float64
    ctf_sq_sum : (n_radii,) float64
        Sum of :func:`ctf_sq` over the particles in ``sums``.
    snr : float
        Above 0.

    Returns
    -------
    (n, n) float64
    """
    n = len(sums)
    radius = np.hypot(np.fft.fftfreq(n, 1 / n)[:, None], np.arange(n // 2 + 1))
    gain = np.interp(radius, np.arange(n_radii(n)), 1 / (ctf_sq_sum + 1 / snr))
    return scipy.fft.irfft2(scipy.fft.rfft2(sums) * gain, s=(n, n))


# --- the particles


class CtfKernels:
    """The CTFs that particles of one box are multiplied by, each computed once while it is held.

    The least recently used make room for others.

    Parameters
    ----------
    box : int, px
        Of the particles; a kernel is on the rfft2 grid of twice the box.
    n_bytes : int
        Held at most, though never less than one kernel.
    """

    def __init__(self, box, n_bytes=KERNEL_BYTES):
        self.box = box
        self._held = lru_cache(maxsize=max(1, n_bytes // (4 * 2 * box * (box + 1))))(self._compute)

    def __call__(self, parameters):
        """The kernel of ``() CTF_PARAMETERS``, (2 box, box + 1) float32."""
        return self._held(parameters.item())

    def _compute(self, values):
        phase, envelope = _phase_and_envelope(np.array(values, CTF_PARAMETERS), 2 * self.box)
        # within half a turn the phase fits float32, whose sine is ten times as fast
        phase -= 2 * np.pi * np.rint(phase / (2 * np.pi))
        kernel = np.sin(phase.astype(np.float32)) * envelope.astype(np.float32)
        kernel.flags.writeable = False  # shared by all who ask
        return kernel


def premultiply(images, parameters, applied, kernels):
    """Multiply particles by their CTF, in place, but for those whose ``ctf_applied`` says that it was done.

    An image is padded to twice its size with the mean of its outermost frame of pixels, its Fourier transform
    multiplied by the CTF, and the image cut out again. Where in the larger box it lies makes no difference.
    The SPEC subtracts the background's mean before; here a constant remains in the result instead, which the
    normalisation that follows takes away (SPEC section 6).

    Parameters
    ----------
    images : (n_images, n, n) float32
    parameters : (n_images,) CTF_PARAMETERS
    applied : (n_images,) bool
    kernels : CtfKernels
    """
    n = kernels.box
    frame = np.ones((n, n), bool)
    frame[1:-1, 1:-1] = False
    wanted = np.flatnonzero(~applied)
    size = max(1, CHUNK_BYTES // (8 * 2 * n * (n + 1)))
    for first in range(0, len(wanted), size):
        chunk = wanted[first:first + size]
        pixels = images[chunk]
        pixels -= pixels[:, frame].mean(axis=1, dtype=np.float64).astype(np.float32)[:, None, None]
        # one axis at a time: the rows that hold nothing but padding are never transformed
        spectra = scipy.fft.fft(scipy.fft.rfft(pixels, 2 * n, axis=2), 2 * n, axis=1)
        for spectrum, i in zip(spectra, chunk, strict=True):
            spectrum *= kernels(parameters[i])
        rows = scipy.fft.ifft(spectra, axis=1, overwrite_x=True)[:, :n]
        images[chunk] = scipy.fft.irfft(rows, 2 * n, axis=2)[:, :, :n]
