"""Whether the service in this container turns: exit 0 when its /livez answers 200. For HEALTHCHECK, which has no curl.

It looks where the service listens: CAMPAIGN_STATS_HTTP_HOST and CAMPAIGN_STATS_HTTP_PORT (not 0, a port nobody knows).
"""

import http.client
import os
import sys

ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # the service listens everywhere, so also here
TIMEOUT_S = 2.0  # less than HEALTHCHECK's


def main() -> int:
    """0 alive, 1 not."""
    host = os.environ.get("CAMPAIGN_STATS_HTTP_HOST") or "127.0.0.1"
    port = int(os.environ.get("CAMPAIGN_STATS_HTTP_PORT") or 8080)
    try:
        connection = http.client.HTTPConnection(ANY.get(host, host), port, timeout=TIMEOUT_S)
        connection.request("GET", "/livez")
        answer = connection.getresponse()
    except (OSError, http.client.HTTPException) as error:
        print(f"/livez on {host}:{port}: {error}")
        return 1
    print(f"/livez on {host}:{port}: {answer.status} {answer.read(200).decode(errors='replace')}")
    return 0 if answer.status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
