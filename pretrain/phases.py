"""The phases of --phases LENGTH:SHARE...: sequences of one length after those of another, each length for a share of the optimizer
steps; without the option there is one phase, of --max-length.

Batches are counted in sequences of the first phase's length: tokens of a micro-batch and of a step are the same in all phases."""
from __future__ import annotations

from itertools import accumulate

from pretrain.command import UserError

DEFAULT_LENGTH = 128


def lengths_and_shares(config) -> list[tuple[int, float]]:
    """(tokens in a sequence, share of the optimizer steps) of each phase; ValueError where --phases holds something else."""
    pairs = [phase.split(":") for phase in config.phases]
    return [(int(length), float(share)) for length, share in pairs] or [(config.max_length or DEFAULT_LENGTH, 1.0)]


def longest(config) -> int:
    """Tokens in a sequence of the phase that has most."""
    return max(length for length, _ in lengths_and_shares(config))


def option_of(config) -> str:
    """The option that the lengths come by."""
    return "--phases" if config.phases else "--max-length"


def least_micro_batch_size(config) -> int:
    """Sequences of the first length that make room for one of the longest."""
    return -(-longest(config) // lengths_and_shares(config)[0][0])


def problems_of(config) -> list[str]:
    """What is wrong with --phases, and with other options beside it."""
    shown, problems = f"--phases {' '.join(config.phases)}", []
    try:
        lengths, shares = zip(*lengths_and_shares(config))
    except ValueError:
        return [f"{shown}: needed is LENGTH:SHARE for each phase, such as 128:0.9 512:0.1 (in quotes where YAML has it)"]
    if config.phases and config.max_length is not None:
        problems.append(f"{shown} --max-length {config.max_length}: exclude each other; needed is one of the two")
    if not all(share > 0 for share in shares) or not abs(sum(shares) - 1) <= 1e-6:
        problems.append(f"{shown}: needed are shares above 0 that sum to 1")
    micro = getattr(config, "micro_batch_size", None) or 0
    if not all(8 <= length <= 1 << 16 for length in lengths):
        problems += [f"{shown}: needed are lengths of 8 to 65536 tokens"] * bool(config.phases)
    elif 1 <= micro < least_micro_batch_size(config):
        problems.append(f"--micro-batch-size {micro}: is {micro * lengths[0]} tokens, less than a sequence of {longest(config)}; needed is "
                        f"at least {least_micro_batch_size(config)} with {shown}")
    return problems


def phase_ends(config, total_steps: int) -> list[int]:
    """The number of steps after which each phase has ended; UserError where one would have none."""
    ends = [round(total_steps * share) for share in accumulate(share for _, share in lengths_and_shares(config))][:-1] + [total_steps]
    steps = [end - begin for begin, end in zip([0, *ends], ends)]
    if min(steps) < 1:
        raise UserError(f"--phases {' '.join(config.phases)}: of {total_steps} steps they have {', '.join(map(str, steps))}; needed is one "
                        "at least for each, by other shares or more steps (--max-steps, --epochs)")
    return ends
