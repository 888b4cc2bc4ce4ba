"""Mixtures: micro-batches alternate between texts, in given shares of the tokens.

A micro-batch holds one text, so each text keeps its own plans, and is repeated as often as its
share asks for. Whose turn it is depends only on the tokens that each text has given so far. These
belong to the position, so a micro-batch of a mixture is a pure function of its position, too.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch.utils.data import Dataset

from pretrain.data.collate import Examples
from pretrain.data.loader import DataPosition, PretrainingDataset

NUMBERS = 4  # of each text in a position: epoch, place, micro-batch, tokens


class MixturePosition(NamedTuple):
    """The position of a micro-batch: for each text, its next micro-batch and the tokens that it has
    given so far, [CLS] and [SEP] included."""

    places: tuple[DataPosition, ...]
    tokens: tuple[int, ...]
    progress: float = 0.0  # as in DataPosition

    @property
    def numbers(self) -> tuple[int, ...]:
        """Plain whole numbers, NUMBERS for each text; `Mixture.position_of` reads them."""
        pairs = zip(self.places, self.tokens)
        return tuple(number for place, tokens in pairs for number in (*place.numbers, tokens))

    def __str__(self) -> str:  # the form that show_masks.py takes
        return " ".join(map(str, (*self.numbers, self.progress)))


def furthest_behind(tokens: Sequence[int], weights: Sequence[float]) -> int:
    """Index of the text that lacks the most tokens of its share of all `tokens`; the first of
    equals. Exact for whole weights, which are in proportion to the shares."""
    total, whole = sum(tokens), sum(weights)
    missing = [weight * total - whole * given for weight, given in zip(weights, tokens)]
    return missing.index(max(missing))


class Mixture(Dataset):
    """Micro-batches of `parts`, which have one task, by position; endless, like its parts."""

    def __init__(self, parts: Sequence[PretrainingDataset], weights: Sequence[float]):
        self.parts, self.weights = tuple(parts), tuple(weights)
        self.task = parts[0].task
        self.shares = tuple(weight / sum(weights) for weight in weights)  # of the tokens, by part
        # Each part at its beginning; nothing is drawn yet.
        self.start = MixturePosition(tuple(part.start for part in parts), (0,) * len(parts))

    def position_of(self, numbers: Sequence[int]) -> MixturePosition:
        """The position with these `numbers`; ValueError if they are not NUMBERS for each part."""
        if len(numbers) != NUMBERS * len(self.parts):
            expected = f"{NUMBERS} for each of {len(self.parts)} texts"
            raise ValueError(f"{len(numbers)} numbers; expected {expected}")
        rows = [numbers[first : first + NUMBERS] for first in range(0, len(numbers), NUMBERS)]
        pairs = zip(self.parts, rows)
        places = tuple(part.position_of(row[:-1]) for part, row in pairs)
        return MixturePosition(places, tuple(row[-1] for row in rows))

    def __getitem__(self, position: MixturePosition) -> Examples:
        """Examples of the micro-batch at `position`."""
        number = furthest_behind(position.tokens, self.weights)
        place = position.places[number]._replace(progress=position.progress)
        return self.parts[number][place]

    def positions(
        self, start: MixturePosition, end_epoch: int | None = None
    ) -> Iterator[MixturePosition]:
        """Positions from `start` on, endless or up to where the first part begins `end_epoch`."""
        walks = [part.positions(place) for part, place in zip(self.parts, start.places)]
        places, tokens = list(map(next, walks)), list(start.tokens)
        while places[0].epoch != end_epoch:
            yield MixturePosition(tuple(places), tuple(tokens))
            number = furthest_behind(tokens, self.weights)
            tokens[number] += self.parts[number].count_tokens(places[number])
            places[number] = next(walks[number])

    def next_shards(self, position: MixturePosition) -> MixturePosition:
        """`position`, where each text that is inside a shard skips to the beginning of its next."""
        pairs = zip(self.parts, position.places)
        return position._replace(places=tuple(part.next_shards(place) for part, place in pairs))
