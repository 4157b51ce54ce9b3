"""Tokens at the sync-stats door: hashed, and compared in a time that says nothing."""

import hashlib
import hmac
from typing import Any
from uuid import UUID

import pytest

from consumer import web

TOKENS = ("first", "second", "third")
DIGESTS = {hashlib.sha256(token.encode()).hexdigest(): None for token in TOKENS}


async def nothing(campaign_id: UUID, user_id: UUID | None) -> bytes | None:
    """Never called here."""
    raise AssertionError


def door() -> web.ApiDoor:
    return web.ApiDoor("127.0.0.1", 0, DIGESTS, web.Rate(0), nothing, lambda status, seconds: None)


@pytest.mark.parametrize("sent", [*TOKENS, "fourth", "", "first "])
def test_every_known_token_is_compared_whatever_was_sent(monkeypatch: pytest.MonkeyPatch, sent: str) -> None:
    compared: list[Any] = []

    def compare(known: bytes, digest: bytes) -> bool:
        assert len(known) == len(digest) == 64, "hashes of one length, whatever the token's"
        compared.append(known)
        return hmac.compare_digest(known, digest)

    monkeypatch.setattr(web, "hmac", type("hmac", (), {"compare_digest": staticmethod(compare)}))
    found = door()._token([f"Bearer {sent}"])
    assert len(compared) == len(TOKENS)
    assert found == (hashlib.sha256(sent.strip().encode()).hexdigest().encode() if sent.strip() in TOKENS else None)


@pytest.mark.parametrize(
    "headers", [[], ["first"], ["Basic first"], ["Bearer"], ["Bearer first", "Bearer first"], [next(iter(DIGESTS))]]
)
def test_anything_but_one_bearer_token_is_refused(headers: list[str]) -> None:
    assert door()._token(headers) is None


def test_a_digest_is_no_token() -> None:
    assert door()._token([f"Bearer {next(iter(DIGESTS))}"]) is None


def test_what_a_stranger_sends_leaves_nothing_behind() -> None:
    rate = web.Rate(60)
    guarded = web.ApiDoor("127.0.0.1", 0, DIGESTS, rate, nothing, lambda status, seconds: None)
    for number in range(1_000):
        assert guarded._token([f"Bearer {number}"]) is None
    assert rate._full_at == {}
