"""Noise schedules and respacing: which betas the forward process uses, and which of its timesteps a sampler visits.

Everything here is float64 numpy, computed once outside of jax. `timesteps` is the paper's T.
"""

import math

import numpy as np

MAX_BETA = 0.999

RESPACINGS = '"27" (evenly spaced), "10,10,3,2,2" (steps in each equal section), "ddim25" (fixed stride) or "fast27"'


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
    """The betas of the schedule `name` ("linear" or "cosine"), float64 [timesteps]; ValueError for any other name."""
    if name not in SCHEDULES:
        raise ValueError(f"unknown noise schedule {name!r}; the schedules are {sorted(SCHEDULES)}")
    return SCHEDULES[name](timesteps)


def respace(spec: str, timesteps: int) -> tuple[int, ...]:
    """The timesteps, ascending, that the respacing `spec` keeps of 0..timesteps-1 (IDDPM Sec. 4; GLIDE's respace.py).

    - `"25"`: 25 evenly spaced steps, the first and the last timestep included. `"1"` is the last timestep alone, the
      only one from which pure noise can be denoised.
    - `"10,10,3,2,2"`: the timesteps are cut into equal sections, from the least noisy to the noisiest, and each is
      given so many evenly spaced steps, its ends included (a count of 1 keeps the section's first timestep).
    - `"ddim25"`: a fixed integer stride from 0 that gives exactly 25 steps.
    - `"fast27"`: GLIDE's hand-tuned 27 steps, `"10,10,3,2,2"` with the last timestep moved down by two.

    ValueError, naming the spec, if it is malformed or asks for more steps than there are.
    """
    if spec == "fast27":
        return (*_sections(spec, [10, 10, 3, 2, 2], timesteps)[:-1], timesteps - 3)
    if isinstance(spec, str) and spec.startswith("ddim"):
        return _strided(spec, _counts(spec, spec[len("ddim") :])[0], timesteps)
    counts = _counts(spec, spec)
    if counts == [1]:
        return (timesteps - 1,)
    return _sections(spec, counts, timesteps)


def _counts(spec: str, text: str) -> list[int]:
    """The positive step counts written in `text`, separated by commas; only the section notation may have several."""
    parts = text.split(",") if isinstance(text, str) else []
    single_only = isinstance(spec, str) and spec.startswith("ddim")
    well_formed = all(part.strip().isascii() and part.strip().isdigit() and int(part) > 0 for part in parts)
    if not parts or not well_formed or (single_only and len(parts) > 1):
        raise ValueError(f"bad respacing {spec!r}; write {RESPACINGS}, with counts of at least 1")
    return [int(part) for part in parts]


def _sections(spec: str, counts: list[int], timesteps: int) -> tuple[int, ...]:
    size, longer = divmod(timesteps, len(counts))
    kept, start = [], 0
    for section, count in enumerate(counts):
        length = size + (section < longer)
        if count > length:
            raise ValueError(
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


def _strided(spec: str, count: int, timesteps: int) -> tuple[int, ...]:
    for stride in range(1, timesteps + 1):
        if len(range(0, timesteps, stride)) == count:
            return tuple(range(0, timesteps, stride))
    raise ValueError(
        f"respacing {spec!r}: no integer stride gives {count} of {timesteps} timesteps; write {RESPACINGS}"
    )
