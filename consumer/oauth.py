"""OAuth 2: access tokens by the client-credentials grant (RFC 6749, section 4.4), for logging in to Kafka."""

import asyncio
import time
from base64 import b64encode
from typing import Final
from urllib.parse import quote_plus

import aiohttp

from consumer.errors import ConfigError, Unavailable

FETCH_DEADLINE_S: Final = 5.0  # below the deadlines of the clients that wait for a token
LEEWAY_S: Final = 30.0  # a token is not used in its last moments: it has to arrive, and clocks differ
LONGEST_S: Final = 24 * 3600.0  # what claims to be good for longer is not kept
REFUSED: Final = (400, 401, 403)  # RFC 6749, section 5.2: client, secret or scope are not accepted

REFUSAL: Final = (
    "the token endpoint refuses the client ({status}); check CAMPAIGN_STATS_KAFKA_SASL_TOKEN_URL, KAFKA_SASL_USERNAME,"
    " KAFKA_SASL_PASSWORD and KAFKA_SASL_SCOPE"
)


class Tokens:
    """Access tokens for one client, fetched when one is wanted and kept until shortly before they expire."""

    def __init__(self, url: str, client_id: str, secret: str, scope: str | None) -> None:
        self._url = url
        login = f"{quote_plus(client_id)}:{quote_plus(secret)}"  # encoded: section 2.3.1
        self._headers = {"Authorization": f"Basic {b64encode(login.encode()).decode()}"}
        self._form = {"grant_type": "client_credentials", **({"scope": scope} if scope else {})}
        self._token = ""
        self._good_until = 0.0  # monotonic
        self._fetching = asyncio.Lock()  # connections opened together share one token

    async def token(self) -> str:
        """A token that is good for a while. Raises Unavailable, or ConfigError when the endpoint refuses the client."""
        async with self._fetching:
            if time.monotonic() >= self._good_until:
                asked_at = time.monotonic()
                self._token, lifetime_s = await self._fetch()
                self._good_until = asked_at + lifetime_s - LEEWAY_S
            return self._token

    async def _fetch(self) -> tuple[str, float]:
        """A new token and for how many seconds it is good, 0 when that is not said."""
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=FETCH_DEADLINE_S)) as session,
                session.post(self._url, data=self._form, headers=self._headers, allow_redirects=False) as response,
            ):
                if response.status in REFUSED:
                    raise ConfigError([REFUSAL.format(status=response.status)])
                if response.status != 200:
                    raise Unavailable("kafka", f"the token endpoint answers {response.status}")
                answer = await response.json(content_type=None)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise Unavailable("kafka", f"{type(error).__name__} while asking the token endpoint") from error
        token = answer.get("access_token") if isinstance(answer, dict) else None
        if not isinstance(token, str) or not token.isascii() or not token.isprintable() or not token:
            raise Unavailable("kafka", "the token endpoint's answer holds no access token")
        return token, _seconds(answer.get("expires_in"))


def _seconds(value: object) -> float:
    """A lifetime as endpoints write it, in digits or in quotes; 0 for anything else."""
    try:
        seconds = float(str(value))
    except ValueError:
        return 0.0
    return seconds if 0 < seconds <= LONGEST_S else 0.0
