"""Masks: one draw over units for every strategy.

A strategy says where units begin (tokens, words); units get random keys and are taken in key order within the budget of
their sequence; units that do not fit are passed over. Of what is taken, shares become [MASK], a random ordinary token, or
stay, drawn per token as in BERT (Devlin et al. 2019).
"""
from __future__ import annotations

import numpy as np

from pretrain.data.corpus import WORD_START
from pretrain.data.draws import derive, integers, uniform
from pretrain.data.tokenizer import Vocabulary


def unit_starts(masking: str, flags: np.ndarray, maskable: np.ndarray) -> np.ndarray:
    """bool [T]: where a unit begins. Only maskable tokens belong to units, and a unit never reaches over another token."""
    if masking == "token":
        return maskable
    after_gap = np.concatenate([[True], ~maskable[:-1]])
    return maskable & (after_gap | (flags & WORD_START).astype(bool))


def choose(starts: np.ndarray, maskable: np.ndarray, sequence: np.ndarray, keys: np.ndarray, budget: np.ndarray) -> np.ndarray:
    """bool [T]: the tokens that are masked.

    starts, maskable: bool [T]; sequence: int64 [T], ascending; keys: uint64 [T], read where a unit starts; budget: int64
    [N]. For each sequence, in words: for unit in sorted(units, key): if unit.size <= budget: take it, budget -= unit.size.
    A sequence in which even the smallest unit exceeds the budget takes that one."""
    first = np.flatnonzero(starts)
    if not len(first):
        return np.zeros(len(starts), bool)
    unit = np.cumsum(starts) - 1  # [T]; of a token that is not maskable, meaningless
    sizes = np.bincount(unit[maskable], minlength=len(first))
    owner = sequence[first]
    # Sorting sequence number + random fraction is several times faster than a lexsort; 40 bits of key are kept.
    order = np.argsort((owner.astype(np.uint64) << np.uint64(40)) | (keys[first] >> np.uint64(24)), kind="stable")
    gap, taken = budget.copy(), np.zeros(len(first), bool)
    candidates = order[sizes[order] <= gap[owner[order]]]
    while len(candidates):
        who, size = owner[candidates], sizes[candidates]
        filled = np.cumsum(size)
        starts_sequence = np.flatnonzero(np.concatenate([[True], who[1:] != who[:-1]]))
        base = np.zeros(len(budget), np.int64)
        base[who[starts_sequence]] = filled[starts_sequence] - size[starts_sequence]
        fits = filled - base[who] <= gap[who]  # a prefix of each sequence's candidates
        taken[candidates[fits]] = True
        gap -= np.bincount(who[fits], weights=size[fits], minlength=len(budget)).astype(np.int64)
        candidates = candidates[~fits]
        candidates = candidates[sizes[candidates] <= gap[owner[candidates]]]  # a gap only shrinks: the rest never fits
    for lonely in np.flatnonzero((gap == budget) & (np.bincount(owner, minlength=len(budget)) > 0) & (budget > 0)):
        units = order[owner[order] == lonely]
        taken[units[np.argmin(sizes[units])]] = True
    return taken[unit] & maskable


def replace(ids: np.ndarray, keys: np.ndarray, split: list[float], vocabulary: Vocabulary) -> np.ndarray:
    """int64 [M]: what stands in place of the masked `ids`; `keys` uint64 [M], one draw a token."""
    draw = uniform(derive(keys, np.uint64(1)))
    random_ids = vocabulary.ordinary_ids[integers(derive(keys, np.uint64(2)), len(vocabulary.ordinary_ids))]
    return np.where(draw < split[0], vocabulary.mask_id, np.where(draw < split[0] + split[1], random_ids, ids)).astype(np.int64)
