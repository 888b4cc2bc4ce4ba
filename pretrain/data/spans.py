"""Spans of characters in the cell of a record, in the spellings of common tools."""

import json
from collections.abc import Sequence

from pretrain.errors import UserError, refusing

SPAN_KEYS = ("start end", "start_offset end_offset", "start_pos end_pos", "begin end")
LABEL_KEYS = ("label", "type", "tag", "entity_group", "entity_type", "label_type")
SPAN_FORMS = '[start, end, ...] or {"start": 0, "end": 4}, in characters'

Entity = tuple[int, int, str]  # start, end, label; "" if it has none


def read_spans(value: object, where: str) -> list[Entity]:
    """The spans of a cell, which holds a list of spans or a single one, as objects or as JSON.

    UserError about `where` if it holds anything else."""
    if isinstance(value, str):  # a cell of a table
        with refusing(f"{where}: {value[:40]!r} is not JSON", "expected [[start, end], ...]"):
            value = json.loads(value or "[]")
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        value = [dict(zip(value, row)) for row in zip(*value.values())]  # columns to rows
    if value is None:
        return []
    items = value if isinstance(value, list) else [value]
    return [_span(item, where) for item in items]


def check_spans(spans: Sequence[tuple], text: str, where: str) -> None:
    """UserError if one of the sorted `spans` overlaps another or lies outside the text."""
    previous_end = 0
    for start, end, *_ in spans:
        if not previous_end <= start < end <= len(text):
            expected = f"spans within the {len(text)} characters, without overlap"
            raise UserError(f"{where}: bad span [{start}, {end}]; expected {expected}")
        previous_end = end


def _span(span: object, where: str) -> Entity:
    ends, label = span, None
    if isinstance(span, dict):
        known = [keys.split() for keys in SPAN_KEYS if set(keys.split()) <= set(span)]
        ends = [span[key] for key in known[0]] if known else None
        label = next((span[key] for key in LABEL_KEYS if key in span), None)
    elif isinstance(span, (list, tuple)) and len(span) > 2:
        label = span[2]
    if isinstance(ends, (list, tuple)) and [type(end) for end in ends[:2]] == [int, int]:
        return ends[0], ends[1], "" if label is None else str(label).strip()
    raise UserError(f"{where}: {str(span)[:60]!r} is not a span; expected {SPAN_FORMS}")
