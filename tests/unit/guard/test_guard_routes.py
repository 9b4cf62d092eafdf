"""Which route is for whom, by path alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightsync_engine.guard.routes import Access, access, route_path

OPEN = ["/health", "/metrics", "/metrics/", "/ping", "/version"]
INFERENCE = [
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/responses/resp_123-a",
    "/v1/responses/resp_123/cancel",
    "/v1/models",
    "/invocations",
    "/inference/v1/generate",
    "/tokenize",
    "/generative_scoring",
    "/pooling",
]
AGENT = [
    "/pause",
    "/collective_rpc",
    "/start_draft_weight_update",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/v1/responses/",
    "/v1/responses/a/b",
    "/v1/responses/../../pause",
    "/v1/responses/a%2fcancel",
    "/docs",
    "/server_info",
    "/metrics/../pause",
    "/health/",
    "/Health",
    "/health ",
    " /health",
    "/health\n",
    "/v1/completions\n",
    "//health",
    "/./health",
    "/health;a=b",
    "/v1",
    "/v1/",
    "",
    "/",
    "health",
    "/static/swagger-ui.css",
    "/weightsync/v1/status",
]


@pytest.mark.parametrize("path", OPEN)
def test_open(path):
    assert access(path) is Access.OPEN


@pytest.mark.parametrize("path", INFERENCE)
def test_inference(path):
    assert access(path) is Access.PERMIT


@pytest.mark.parametrize("path", AGENT)
def test_all_else_is_the_agents(path):
    assert access(path) is Access.TOKEN


@given(st.text())
def test_an_unknown_path_is_the_agents(path):
    if path not in OPEN and not path.startswith(("/v1/", "/v2/", "/cohere/")):
        assert access("/x" + path) is Access.TOKEN


@pytest.mark.parametrize(
    ("path", "root", "routed"),
    [
        ("/v1/completions", "", "/v1/completions"),
        ("/api/pause", "/api", "/pause"),
        ("/api/v1/completions", "/api", "/v1/completions"),
        ("/apipause", "/api", "/apipause"),
        ("/pause", "/api", "/pause"),
        ("/api", "/api", ""),
    ],
)
def test_a_path_is_judged_as_the_application_will_route_it(path, root, routed):
    from starlette.routing import get_route_path

    scope = {"path": path, "root_path": root}
    assert route_path(scope) == routed
    assert route_path(scope) == get_route_path(scope)


@given(st.text(), st.text())
def test_routing_by_starlette_and_by_the_guard_never_differ(path, root):
    from starlette.routing import get_route_path

    scope = {"path": path, "root_path": root}
    assert route_path(scope) == get_route_path(scope)
