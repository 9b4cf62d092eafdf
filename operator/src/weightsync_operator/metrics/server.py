"""``GET /metrics``, in the clear and for anybody who reaches the port: a NetworkPolicy says who does."""

from aiohttp import web
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest


def new_registry() -> CollectorRegistry:
    """A registry of a replica's own, with the process' memory, time and files in it."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


def metrics_app(registry: CollectorRegistry) -> web.Application:
    """Answers in Prometheus' text format."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.router.add_get("/metrics", answer)
    return app
