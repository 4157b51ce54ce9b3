"""Records as nobody should write them, among good ones: what each must become, and which batches they stand in.

Everything follows from one seed. Nothing here is the service's own code.
"""

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, Final, NamedTuple
from uuid import UUID

from tests.service.test_bad_input import Given, binary, text, without
from tests.world import USER, hint, sync_request

CODECS: Final = (None, "gzip", "snappy", "lz4", "zstd")
PACKED: Final = CODECS[1:]
BATCH_SIZES: Final = (1, 2, 10, 50, 300, 1_000)
NEAR_LIMIT: Final = 8 * 2**20 - 10_000  # of a topic that takes 8 MB
BOMB: Final = 128 * 2**20
SPACES: Final = 10_000_000  # what one record may well hold when a batch is packed: a few kB on the wire
NOBODY: Final = "8c2b2d4e-e29b-41d4-a716-446655440000"
OWN: Final = (("x", b"\x00\xff"), ("x", None), ("dead-letter-reason", b"mine"), ("\N{SNOWMAN}", b""), ("", b"empty"))


class HeaderKey(str):
    """A header key whose bytes are not UTF-8, which no client can hand out."""

    __slots__ = ()

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        """What is written in its place."""
        return b"\xff\xfe" + super().encode(encoding, errors)


Make = Callable[[UUID, str], Given]
"""A record for this campaign, with this event id."""


def _hint(**changes: Any) -> Make:
    return lambda campaign, identity: Given(text(hint(campaign, **{"id": identity, **changes})))


def _data(**data: Any) -> Make:
    return _hint(data=data)


def _request(**changes: Any) -> Make:
    return lambda campaign, identity: Given(text(sync_request(campaign, **{"id": identity, **changes})))


def _bytes(value: bytes) -> Make:
    return lambda _, identity: Given(value, identity.encode(), OWN)


def _event(change: Callable[[dict[str, Any]], bytes]) -> Make:
    return lambda campaign, identity: Given(change(hint(campaign, id=identity)), b"\xff\x00key", OWN)


def _binary(value: bytes | None = None, **headers: bytes | None) -> Make:
    return lambda campaign, identity: binary(hint(campaign, id=identity), value, **headers)


def _binary_request(campaign: UUID, identity: str) -> Given:
    return binary(sync_request(campaign, id=identity))


# Name -> what must become of it: a dead-letter reason; `served` (the campaign is recounted and told), `answered`,
# `not_found` (a request and its answer); `ignored`.
KINDS: Final[Mapping[str, tuple[str, Make]]] = {
    "text that is cut in a character": ("not_utf8", _event(lambda e: text(e)[:-2] + b', "x": "\xc3"}}')),
    "latin-1": ("not_utf8", _event(lambda e: text(e)[:-2] + b', "x": "Andr\xe9"}}')),
    "a surrogate as bytes": ("not_utf8", _event(lambda e: text(e)[:-2] + b', "x": "\xed\xa0\x80"}}')),
    "utf-16": ("not_utf8", _event(lambda e: text(e).decode().encode("utf-16"))),
    "avro of a schema registry": ("not_utf8", _bytes(b"\x00\x00\x00\x00\x07\xff\xfe")),
    "random bytes": ("not_utf8", lambda c, i: Given(b"\xff" + random.Random(i).randbytes(200), None, OWN)),
    "binary: an attribute that is not utf-8": ("not_utf8", _binary(source=b"\xff")),
    "nothing": ("not_json", _bytes(b"")),
    "a cut object": ("not_json", _event(lambda e: text(e)[:-1])),
    "something behind the object": ("not_json", _event(lambda e: text(e) + b"x")),
    "two objects": ("not_json", _event(lambda e: text(e) + text(e))),
    "NaN": ("not_json", _event(lambda e: text(e, x="NaN"))),
    "Infinity": ("not_json", _event(lambda e: text(e, x="-Infinity"))),
    "single quotes": ("not_json", _bytes(b"{'a': 1}")),
    "a comment": ("not_json", _bytes(b"// {}")),
    "a byte order mark": ("not_json", _event(lambda e: b"\xef\xbb\xbf" + text(e))),
    "a zero byte in a string": ("not_json", _event(lambda e: text(e).replace(b"sent", b"se\x00nt"))),
    "too deep": ("not_json", _event(lambda e: text(e, x="[" * 3_000 + "]" * 3_000))),
    "html of a proxy": ("not_json", _bytes(b"<html><body>502 Bad Gateway</body></html>")),
    "a stack trace": ("not_json", _bytes(b"Traceback (most recent call last):\n  File ...")),
    "binary: no json in the value": ("not_json", _binary(b"to_status=sent")),
    "null as json": ("not_cloudevent", _bytes(b"null")),
    "a number": ("not_cloudevent", _bytes(b"7")),
    "a bare string": ("not_cloudevent", _bytes(b'"sent"')),
    "batch mode": ("not_cloudevent", _event(lambda e: b"[" + text(e) + b"]")),
    "no specversion": ("not_cloudevent", _event(lambda e: without(e, "specversion"))),
    "specversion 0.3": ("not_cloudevent", _hint(specversion="0.3")),
    "no id": ("not_cloudevent", _event(lambda e: without(e, "id"))),
    "a number as id": ("not_cloudevent", _hint(id=7)),
    "no source": ("not_cloudevent", _event(lambda e: without(e, "source"))),
    "no type": ("not_cloudevent", _event(lambda e: without(e, "type"))),
    "data_base64": ("not_cloudevent", _hint(data_base64="e30=")),
    "U+0000 in the id": ("not_cloudevent", _hint(id="a\x00")),
    "a lone surrogate in an extension": ("not_cloudevent", _hint(anything="\ud800")),
    "binary: no source": ("not_cloudevent", _binary(source=None)),
    "a type of somebody else": ("unknown_type", _hint(type="order.created.v1")),
    "a type without version": ("unknown_type", _hint(type="prospect.status_changed")),
    "our own event": ("unknown_type", _hint(type="campaign.paused.v1")),
    "a type in upper case": ("unknown_type", _hint(type="PROSPECT.STATUS_CHANGED.V1")),
    "binary: a type with a blank": ("unknown_type", _binary(type=b"prospect.status_changed.v1 ")),
    "no data": ("invalid_campaign_id", _event(lambda e: without(e, "data"))),
    "no campaign": ("invalid_campaign_id", _data(campaign_id=None)),
    "a number as campaign": ("invalid_campaign_id", _data(campaign_id=17)),
    "a campaign's name": ("invalid_campaign_id", _data(campaign_id="Spring")),
    "an id without dashes": ("invalid_campaign_id", _data(campaign_id=NOBODY.replace("-", ""))),
    "an id with a newline": ("invalid_campaign_id", _data(campaign_id=f"{NOBODY}\n")),
    "an id of version 9": ("invalid_campaign_id", _data(campaign_id="8c2b2d4e-e29b-91d4-a716-446655440000")),
    "an id of another variant": ("invalid_campaign_id", _data(campaign_id="8c2b2d4e-e29b-41d4-c716-446655440000")),
    "a newer version without campaign": (
        "invalid_campaign_id", _hint(type="prospect.status_changed.v7", data={"campaign_id": ""})),
    "a request without campaign": ("invalid_campaign_id", _request(data={"campaign_id": {}})),
    "binary: no campaign": ("invalid_campaign_id", _binary(b"{}")),
    "no to_status": ("invalid_data", _data(to_status=None)),
    "an empty to_status": ("invalid_data", _data(to_status="")),
    "a to_status nobody can store": ("invalid_data", _data(to_status="a\x00")),
    "a number as prospect": ("invalid_data", _data(prospect_id=7)),
    "a list as from_status": ("invalid_data", _data(from_status=["pending"])),
    "a request of a name": ("invalid_data", _request(data={"user_id": "Peter"})),
    "a request with a number as reason": ("invalid_data", _request(data={"reason": 7})),
    "binary: no prospect": (
        "invalid_data", lambda c, i: binary(hint(c, id=i), json.dumps({"campaign_id": str(c)}).encode())),
    "an id in upper case": ("served", lambda c, i: Given(text(hint(str(c).upper(), id=i)))),
    "a newer version": ("served", _hint(type="prospect.status_changed.v2", data={"to_status": {}})),
    "a newer request": ("served", _request(type="campaign.sync_requested.v3", data={"user_id": 7})),
    "unknown fields": ("served", _hint(colour="red", data={"more": [1, {"deep": None}]})),
    "an unknown status": ("served", _data(to_status="snoozed")),
    "a lone surrogate that nobody reads": ("served", lambda c, i: Given(text(hint(c, id=i), x='"\\ud800"'))),
    "a broken trace": ("served", _hint(traceparent="00-xyz", correlationid=7)),
    "blanks around": ("served", lambda c, i: Given(b"\r\n\t " + text(hint(c, id=i)) + b"\n")),
    "a user that is none": ("served", _data(user_id=7)),
    "a wrong time": ("served", _hint(time="yesterday", subject=None)),
    "binary mode": ("served", _binary()),
    "binary headers as copies": ("served", lambda c, i: Given(
        text(hint(c, id=i)), None, (("content-type", b"application/cloudevents+json"), ("ce_id", b"\xff")))),
    "a request with more": ("answered", _request(data={"more": 1, "user_id": None})),
    "a request of the owner, in upper case": ("answered", _request(data={"user_id": str(USER).upper()})),
    "a request in binary mode": ("answered", _binary_request),
    "a request of a stranger": ("not_found", _request(data={"user_id": NOBODY})),
    "a request for nobody": ("not_found", lambda _, i: Given(text(sync_request(NOBODY, id=i)))),
    "a hint for nobody": ("ignored", lambda _, i: Given(text(hint(NOBODY, id=i)))),
    "a tombstone": ("ignored", lambda c, i: Given(None, str(c).encode())),
    "a tombstone with headers": ("ignored", lambda c, i: Given(None, None, (("ce_id", b"\xff"), *OWN))),
}  # fmt: skip
GARBAGE: Final = [
    name for name, (fate, _) in KINDS.items() if fate not in ("served", "answered", "not_found", "ignored")
]
ODD: Final = [name for name in KINDS if name not in GARBAGE]

GOOD: Final[Mapping[str, tuple[str, Make]]] = {
    "a hint": ("served", _hint()),
    "a request": ("answered", _request()),
    "a hint in binary mode": ("served", _binary()),
    "a request in binary mode": ("answered", _binary_request),
}
LARGE: Final[Mapping[str, tuple[str, Make]]] = {
    "a hint near the limit": ("served", lambda c, i: Given(text(hint(c, id=i, data={"x": "x" * NEAR_LIMIT})))),
    "garbage near the limit": ("not_json", _bytes(b"{" + b"x" * NEAR_LIMIT)),
    "headers near the limit": ("not_json", lambda c, i: Given(b"{", b"key", (("x", b"x" * NEAR_LIMIT),))),
}
SWOLLEN: Final[Mapping[str, tuple[str, Make]]] = {
    "spaces": ("not_json", _bytes(b" " * SPACES)),
    "a hint with spaces": ("served", lambda c, i: Given(text(hint(c, id=i)) + b" " * SPACES)),
}


class Item(NamedTuple):
    """One record: its kind, what must become of it, the campaign it is about, its event id, its bytes."""

    kind: str
    fate: str
    campaign: UUID
    identity: str
    given: Given


@dataclass(slots=True)
class Batch:
    """Records that are written together. From `broken_from` on nobody can hand them out, for this `reason`."""

    topic: int
    partition: int
    codec: str | None
    items: list[Item]
    reason: str | None = None
    broken_from: int = 0
    flip: bool = False  # a byte of it is changed in the log
    offset: int = field(default=-1)

    def readable(self) -> Sequence[Item]:
        """The records that can be handed out."""
        return self.items if self.reason is None else self.items[: self.broken_from]


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of what is written at once."""

    records: int
    flipped: int  # batches with a byte changed in the log
    keyed: int  # batches with a header key that is not UTF-8
    bombs: int  # each of another compression
    large: int  # of each kind
    swollen: int  # in a row


class Writer:
    """Makes batches of records. `good` are hinted by what can be read, `lost` only by what cannot."""

    def __init__(self, seed: int, good: Sequence[UUID], lost: Sequence[UUID], never: UUID, *, partitions: int) -> None:
        self._random = random.Random(seed)
        self._good, self._lost, self._never = good, lost, never
        self._partitions = partitions
        self._number = 0
        self._codecs = cycle(PACKED)

    def batches(self, scale: Scale) -> Iterator[Batch]:
        """As many records as wanted, in the order in which they are to be written."""
        special = [*self._flipped(scale), *self._keyed(scale), *self._bombs(scale), *self._large(scale)]
        swollen = list(self._swollen(scale))
        left = scale.records - sum(len(batch.items) for batch in special + swollen)
        plain = []
        every = iter([*KINDS] * 3)  # each kind at least three times, whatever the dice say
        while left:
            size = min(left, self._random.choice(BATCH_SIZES))
            plain.append(self._batch([self._any(next(every, None)) for _ in range(size)]))
            left -= size
        batches = special + plain
        self._random.shuffle(batches)
        half = len(batches) // 2
        yield from batches[:half] + swollen + batches[half:]

    def _flipped(self, scale: Scale) -> Iterator[Batch]:
        for number in range(scale.flipped):
            size = min(1_000, scale.records // 10) if number == 0 else self._random.choice(BATCH_SIZES[:-1])
            yield self._batch([self._unseen() for _ in range(size)], reason="unreadable", flip=True)

    def _keyed(self, scale: Scale) -> Iterator[Batch]:
        for number in range(scale.keyed):
            size = min(1_000, scale.records // 10) if number == 0 else self._random.choice(BATCH_SIZES[:-1])
            begin = 0 if number == 0 else self._random.randrange(size)
            batch = self._batch(
                [self._any() for _ in range(begin)] + [self._unseen() for _ in range(size - begin)],
                reason="unreadable",
                broken_from=begin,
            )
            first = batch.items[begin]
            headers = (*first.given.headers, (HeaderKey("key"), b"value"))
            batch.items[begin] = first._replace(given=first.given._replace(headers=headers))
            yield batch

    def _bombs(self, scale: Scale) -> Iterator[Batch]:
        for _ in range(scale.bombs):
            codec = next(self._codecs)
            items = [self._unseen() for _ in range(self._random.choice(BATCH_SIZES[:3]))]
            place = self._random.randrange(len(items))
            items[place] = items[place]._replace(kind=f"a bomb of {codec}", given=Given(b" " * BOMB))
            yield self._batch(items, reason="too_large", codec=codec, topic=0)

    def _large(self, scale: Scale) -> Iterator[Batch]:
        for kind in [*LARGE] * scale.large:
            yield self._batch([self._item(kind, LARGE)], codec=None, topic=0)

    def _swollen(self, scale: Scale) -> Iterator[Batch]:
        partition = self._random.randrange(self._partitions)
        for number in range(scale.swollen):
            kind = "spaces" if number % 8 == 0 else "a hint with spaces"
            yield self._batch([self._item(kind, SWOLLEN)], codec="zstd", topic=0, partition=partition)

    def _batch(self, items: list[Item], **more: Any) -> Batch:
        drawn = {
            "topic": self._random.randrange(2),
            "partition": self._random.randrange(self._partitions),
            "codec": self._random.choice(CODECS),
        }
        return Batch(**{**drawn, **more}, items=items)

    def _any(self, kind: str | None = None) -> Item:
        if kind is None:
            dice = self._random.random()
            if dice < 0.65:
                return self._item(self._random.choices([*GOOD], (10, 1, 2, 1))[0], GOOD)
            kind = self._random.choice(GARBAGE if dice < 0.92 else ODD)
        return self._item(kind, KINDS)

    def _unseen(self) -> Item:
        """About a campaign that nothing readable is about."""
        if self._random.random() < 0.3:
            return self._any(self._random.choice(GARBAGE))
        return self._item("a hint", GOOD, self._random.choice(self._lost))

    def _item(self, kind: str, kinds: Mapping[str, tuple[str, Make]], campaign: UUID | None = None) -> Item:
        fate, make = kinds[kind]
        self._number += 1
        identity = f"e-{self._number}"
        if campaign is None:
            campaign = self._random.choice(self._good) if fate in ("served", "answered", "not_found") else self._never
        return Item(kind, fate, campaign, identity, make(campaign, identity))
