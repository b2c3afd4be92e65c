"""Every random draw as a function of (seed, purpose, place), never of what ran before."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_of(*parts: int | str) -> int:
    """A seed in [0, 2^63) from the run's seed and the names of the draw."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator of its own, seeded by ``seed_of``."""
    return torch.Generator().manual_seed(seed_of(*parts))


def seed_global(device: torch.device, *parts: int | str) -> None:
    """Seed the global generators of the CPU and of ``device``.

    ``torch.manual_seed`` would do, but formats a stack trace at every call for a CUDA that may
    never start; this is called at every step.
    """
    seed = seed_of(*parts)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


@contextmanager
def preserved(device: torch.device) -> Iterator[None]:
    """The global generators of the CPU and of ``device`` are as before afterwards."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    mps = torch.mps.get_rng_state() if device.type == "mps" else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        if mps is not None:
            torch.mps.set_rng_state(mps)
