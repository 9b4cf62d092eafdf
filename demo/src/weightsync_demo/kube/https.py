"""One GET to the API server, by the standard library alone."""

import http.client
import ssl
from pathlib import Path
from urllib.parse import urlsplit

TIMEOUT_S = 2.0


def get_status(url: str, path: str, ca_file: Path, token: str) -> int:
    """The status of `GET path`; OSError or http.client.HTTPException where nobody answers in TIMEOUT_S.

    The certificate is verified with `ca_file` and nothing else; a proxy that the environment names is not
    asked.
    """
    target = urlsplit(url)
    context = ssl.create_default_context(cafile=str(ca_file))
    connection = http.client.HTTPSConnection(
        target.hostname or "", target.port, timeout=TIMEOUT_S, context=context
    )
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"})
        return connection.getresponse().status
    finally:
        connection.close()
