"""Seeds of samples, from run, step and prompt."""

import hashlib


def prompt_seed(run_seed: int, phase: str, step: int, prompt_id: str) -> int:
    """A seed in [0, 2^62) for the samples of one prompt, from a hash of the four arguments.

    It depends on neither rank nor batch, so a prompt's samples do not change with the number of devices. Hashing keeps
    seeds far apart, which matters: engines give child i of a request the seed `seed + i`, so that neighbouring seeds
    would share all but one of their samples.
    """
    key = "\0".join((str(run_seed), phase, str(step), prompt_id)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 2
