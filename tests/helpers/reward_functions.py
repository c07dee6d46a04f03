"""Reward functions that misbehave on request: of the standard library alone, so that their processes start quickly.

What a completion says decides: a score by `score_of`, and a word that names a fault.
"""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path


def score_of(completion):
    """A number that only this completion has."""
    return int.from_bytes(hashlib.sha256(completion.encode()).digest()[:6], "big") / 1e9


def scores(prompts, completions, metadata):
    return [score_of(completion) for completion in completions]


def count_words(prompts, completions, metadata):
    return [float(len(completion.split())) for completion in completions]


def misbehaving(prompts, completions, metadata):
    values = scores(prompts, completions, metadata)
    for i, completion in enumerate(completions):
        for fault, action in FAULTS.items():
            if fault in completion:
                values = action(values, i)
    return values


def hangs(values, i):
    time.sleep(3600)


def hangs_in_c(values, i):
    re.match(r"(a+)+$", "a" * 60 + "b")  # holds the interpreter: no thread of the process runs, no handler either


def raises(values, i):
    raise KeyError("answer")


def ends(values, i):
    os._exit(3)


def is_killed(values, i):
    os.kill(os.getpid(), signal.SIGKILL)


def crashes(values, i):
    os.kill(os.getpid(), signal.SIGSEGV)


def leaves(values, i):
    sys.exit("no more of this")


def wants_memory(values, i):
    raise MemoryError


def one_too_few(values, i):
    return values[:-1]


def no_number(values, i):
    return [*values[:i], "high", *values[i + 1 :]]


def not_scored(values, i):
    return [*values[:i], float("nan"), *values[i + 1 :]]


def is_slow(values, i):
    time.sleep(0.3)
    return values


def is_loud(values, i):
    print("x" * 200_000)
    return values


def starts_a_process(values, i):
    child = subprocess.Popen(["sleep", "3600"])
    Path(os.environ["CHILD_FILE"]).write_text(str(child.pid))
    time.sleep(3600)


FAULTS = {
    "<hang>": hangs,
    "<regex>": hangs_in_c,
    "<raise>": raises,
    "<exit>": ends,
    "<kill>": is_killed,
    "<segfault>": crashes,
    "<sys.exit>": leaves,
    "<memory>": wants_memory,
    "<short>": one_too_few,
    "<text>": no_number,
    "<nan>": not_scored,
    "<slow>": is_slow,
    "<loud>": is_loud,
    "<process>": starts_a_process,
}
