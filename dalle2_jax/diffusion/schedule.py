"""Noise schedules and respacing: which betas the forward process uses, and which of its timesteps a sampler visits.

Everything here is float64 numpy, computed once outside of jax. `timesteps` is the paper's T.
"""

import math

import numpy as np

from dalle2_jax.errors import InputError

MAX_BETA = 0.999

RESPACINGS = (
    '"27" (evenly spaced), "10,10,3,2,2" (steps in each equal section), "ddim25" (fixed stride), "fast27", '
    '"logsnr12" (evenly spaced in the log of the signal-to-noise ratio), or "from25:250" (evenly from timestep 25 on)'
)
# What a network says of an image under more noise than this (half the log of the SNR) is not worth a step of few:
# the bound that DPM-Solver's authors give for the cosine schedule.
LOWEST_HALF_LOG_SNR = -5.1


def linear_betas(timesteps: int) -> np.ndarray:
    """The linear schedule of DDPM (Sec. 4): 1e-4 to 0.02 at T = 1000, scaled by 1000 / T. float64 [timesteps]."""
    scale = 1000 / timesteps
    return np.minimum(np.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=np.float64), MAX_BETA)


def cosine_betas(timesteps: int) -> np.ndarray:
    """The cosine schedule of IDDPM (Eq. 17), abar(t) = cos^2((t + 0.008) / 1.008 * pi / 2), beta <= 0.999. float64 [T].

    As in improved-diffusion the normaliser abar(0) is left out; it cancels in beta_t = 1 - abar(t+1) / abar(t).
    """
    abar = np.array([math.cos((t / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(timesteps + 1)])
    return np.minimum(1 - abar[1:] / abar[:-1], MAX_BETA)


SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas}


def betas(name: str, timesteps: int) -> np.ndarray:
    """The betas of the schedule `name` ("linear" or "cosine"), float64 [timesteps]; InputError for any other name."""
    if name not in SCHEDULES:
        raise InputError(f"unknown noise schedule {name!r}; the schedules are {sorted(SCHEDULES)}")
    return SCHEDULES[name](timesteps)


def zero_terminal_snr(alphas_cumprod: np.ndarray) -> np.ndarray:
    """Shifts and scales sqrt(abar) so that its last value is 0 and its first stays (Lin et al. 2024, Alg. 1)."""
    root = np.sqrt(alphas_cumprod)
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def respace(spec: str, timesteps: int, alphas_cumprod: np.ndarray | None = None) -> tuple[int, ...]:
    """The timesteps, ascending, that the respacing `spec` keeps of 0..timesteps-1 (IDDPM Sec. 4; GLIDE's respace.py).

    - `"25"`: 25 evenly spaced steps, the first and the last timestep included. `"1"` is the last timestep alone, the
      only one from which pure noise can be denoised.
    - `"10,10,3,2,2"`: the timesteps are cut into equal sections, from the least noisy to the noisiest, and each is
      given so many evenly spaced steps, its ends included (a count of 1 keeps the section's first timestep).
    - `"ddim25"`: a fixed integer stride from 0 that gives exactly 25 steps.
    - `"fast27"`: GLIDE's hand-tuned 27 steps, `"10,10,3,2,2"` with the last timestep moved down by two.
    - `"logsnr12"`: 12 steps evenly spaced in log(abar / (1 - abar)), as DPM-Solver wants them (Lu et al. 2022); they
      need the schedule's `alphas_cumprod` (float64 [timesteps]), and leave out timesteps that are all but noise.
    - `"from25:250"`: 250 evenly spaced steps from timestep 25 to the last one, for images that are inverted: they count
      as that noisy.

    InputError, naming the spec, if it is malformed or asks for more steps than there are.
    """
    if spec == "fast27":
        return (*_sections(spec, [10, 10, 3, 2, 2], timesteps)[:-1], timesteps - 3)
    if isinstance(spec, str) and spec.startswith("ddim"):
        return _strided(spec, _counts(spec, spec[len("ddim") :])[0], timesteps)
    if isinstance(spec, str) and spec.startswith("logsnr"):
        return _even_in_log_snr(spec, _counts(spec, spec[len("logsnr") :])[0], alphas_cumprod)
    if isinstance(spec, str) and spec.startswith("from"):
        return _from(spec, timesteps)
    counts = _counts(spec, spec)
    if counts == [1]:
        return (timesteps - 1,)
    return _sections(spec, counts, timesteps)


def _counts(spec: str, text: str) -> list[int]:
    """The positive step counts written in `text`, separated by commas; only the section notation may have several."""
    parts = text.split(",") if isinstance(text, str) else []
    single_only = isinstance(spec, str) and spec.startswith(("ddim", "logsnr"))
    well_formed = all(part.strip().isascii() and part.strip().isdigit() and int(part) > 0 for part in parts)
    if not parts or not well_formed or (single_only and len(parts) > 1):
        raise InputError(f"bad respacing {spec!r}; write {RESPACINGS}, with counts of at least 1")
    return [int(part) for part in parts]


def _sections(spec: str, counts: list[int], timesteps: int) -> tuple[int, ...]:
    size, longer = divmod(timesteps, len(counts))
    kept, start = [], 0
    for section, count in enumerate(counts):
        length = size + (section < longer)
        if count > length:
            raise InputError(
                f"respacing {spec!r} asks for {count} steps in a section of {length} of the {timesteps} timesteps; "
                f"write {RESPACINGS}, with no more steps than timesteps"
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        # The stride is summed, not multiplied, and halves go to the even side: both as in the public respacers, so that
        # published step lists come out to the digit.
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += length
    return tuple(kept)


def _from(spec: str, timesteps: int) -> tuple[int, ...]:
    start, _, text = spec[len("from") :].partition(":")
    counts = _counts(spec, text)
    if not (start.isascii() and start.isdigit()) or len(counts) > 1:
        raise InputError(f"bad respacing {spec!r}; write {RESPACINGS}, with counts of at least 1")
    first = int(start)
    if counts[0] > timesteps - first:
        raise InputError(
            f"respacing {spec!r} asks for {counts[0]} steps of the {max(timesteps - first, 0)} timesteps from {first} "
            f"on; write {RESPACINGS}, with no more steps than timesteps"
        )
    return tuple(first + step for step in respace(str(counts[0]), timesteps - first))


def _strided(spec: str, count: int, timesteps: int) -> tuple[int, ...]:
    for stride in range(1, timesteps + 1):
        if len(range(0, timesteps, stride)) == count:
            return tuple(range(0, timesteps, stride))
    raise InputError(
        f"respacing {spec!r}: no integer stride gives {count} of {timesteps} timesteps; write {RESPACINGS}"
    )


def _even_in_log_snr(spec: str, count: int, alphas_cumprod: np.ndarray | None) -> tuple[int, ...]:
    if alphas_cumprod is None:
        raise InputError(f"respacing {spec!r} counts in the schedule's noise; give its alphas_cumprod")
    abar = np.asarray(alphas_cumprod)
    with np.errstate(divide="ignore"):  # nothing may be left of the image at the last timestep
        half_log_snr = 0.5 * (np.log(abar) - np.log1p(-abar))
    last = int(np.flatnonzero(half_log_snr >= LOWEST_HALF_LOG_SNR)[-1])
    if count > last + 1:
        raise InputError(
            f"respacing {spec!r} asks for {count} steps, but only {last + 1} timesteps are not all but noise; "
            f"write {RESPACINGS}, with no more steps than timesteps"
        )
    if abar[-1] == 0.0 and count > 1:
        # Sampling has to begin where nothing is left of the image (Lin et al. 2023, Sec. 3.3).
        return *_even_in_log_snr(spec, count - 1, abar[:-1]), len(abar) - 1
    if count == 1:
        return (last if abar[-1] else len(abar) - 1,)
    kept: list[int] = []
    for place, target in enumerate(np.linspace(half_log_snr[0], half_log_snr[last], count)):
        nearest = int(np.abs(half_log_snr - target).argmin())
        # Where little noise is, a timestep is wide: each may be kept once, and enough must be left for the others.
        lowest = kept[-1] + 1 if kept else 0
        kept.append(min(max(nearest, lowest), last - (count - 1 - place)))
    return tuple(kept)
