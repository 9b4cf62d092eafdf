"""Which route is for whom.

What is not named here is for the agent: the list of what is open is short, a list of what is dangerous is
never complete.
"""

import re
from collections.abc import MutableMapping
from enum import Enum
from typing import Any, Final


class Access(Enum):
    """Who may use a route."""

    OPEN = "open"
    PERMIT = "permit"
    TOKEN = "token"


OWN: Final = "/weightsync/v1"
STATUS: Final = f"{OWN}/status"
RESTART: Final = f"{OWN}/restart"

_OPEN: Final = frozenset({"/health", "/metrics", "/metrics/", "/ping", "/version"})

_INFERENCE: Final = frozenset(
    {
        "/v1/models",
        "/v1/completions",
        "/v1/completions/render",
        "/v1/completions/derender",
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/chat/completions/render",
        "/v1/chat/completions/derender",
        "/v1/responses",
        "/v1/responses/render",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/messages/render",
        "/v1/decisions",
        "/v1/systemone",
        "/v1/embeddings",
        "/v1/score",
        "/v1/rerank",
        "/v2/embed",
        "/v2/rerank",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/cohere/v2/chat",
        "/cohere/v2/chat/render",
        "/inference/v1/generate",
        "/invocations",
        "/generative_scoring",
        "/pooling",
        "/classify",
        "/score",
        "/rerank",
        "/tokenize",
        "/detokenize",
    }
)
"""Those of vLLM 0.25 to 0.33; not all below /v1 is one: /v1/load_lora_adapter changes what is served."""

_INFERENCE_ITEMS: Final = re.compile(r"/v1/responses/[A-Za-z0-9_\-]+(/cancel)?")


def route_path(scope: MutableMapping[str, Any]) -> str:
    """The path that the application will route by: without the prefix that a proxy in front keeps."""
    path, root = str(scope.get("path", "")), str(scope.get("root_path", ""))
    if not root or not path.startswith(root):
        return path
    rest = path[len(root) :]
    return rest if not rest or rest.startswith("/") else path


def access(path: str) -> Access:
    """Who may use the route ``path``. Only the very spelling counts: everything else is the agent's."""
    if path in _OPEN:
        return Access.OPEN
    if path in _INFERENCE or _INFERENCE_ITEMS.fullmatch(path):
        return Access.PERMIT
    return Access.TOKEN
