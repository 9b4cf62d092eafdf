"""What a kubelet and a person ask the agent: is it alive, may its pod be sent requests, what does it know."""

from collections.abc import Callable

from aiohttp import web

from weightsync_contract.codec import to_document
from weightsync_contract.reasons import Role
from weightsync_engine.agent.core import State, observed
from weightsync_engine.permit import Mode


def ready(state: State) -> tuple[bool, str]:
    """Whether requests to this pod will be answered, and why not.

    This keeps Services away from a pod; it fences nothing: that is the permit's work, in the engine itself.
    """
    if state.role is Role.TRAINER:
        return True, "trainer"
    permit, engine = state.permit.written, state.engine
    if not engine.reachable:
        return False, "the engine does not answer"
    if permit is None:
        return False, f"no permit: {state.serving.state}"
    if permit.boot != engine.boot:
        return False, "the permit is for another boot of the engine"
    if permit.mode is Mode.HOLD:
        # Requests wait for the commit to end, and that is soon: no reason to send them elsewhere.
        return True, f"on hold for a commit, serving {permit.version or 'initial weights'}"
    return True, f"serving {permit.version or 'initial weights'}"


def application(state: Callable[[], State]) -> web.Application:
    """``/healthz``: the event loop turns. ``/readyz``: 200 or 503, with a sentence. ``/observed``: JSON."""

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        yes, why = ready(state())
        return web.Response(text=why + "\n", status=200 if yes else 503)

    async def everything(_: web.Request) -> web.Response:
        return web.json_response(to_document(observed(state())))

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/observed", everything)
    return app
