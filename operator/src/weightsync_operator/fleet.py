"""``GET /v1/weightsyncs/{namespace}/{name}``: the live fleet, for whoever may read the WeightSync itself."""

from collections.abc import Awaitable, Callable

from aiohttp import web

from weightsync_contract.codec import dumps
from weightsync_contract.fleetview import FleetView
from weightsync_contract.names import FLEET_PATH
from weightsync_operator.kube.errors import KubeError
from weightsync_operator.kube.reviews import User
from weightsync_operator.session.server import Leadership, bearer_token
from weightsync_operator.store import Key


class FleetServer:
    """Answers 200 with a FleetView, else ``{"error": sentence}`` with 401, 403, 404 or 503.

    A follower answers 503 with the leader's ``address``. Nobody learns whether a WeightSync exists before
    it is certain that he may read it.
    """

    def __init__(
        self,
        view: Callable[[Key], FleetView | None],
        leadership: Callable[[], Leadership],
        review: Callable[[str, str], Awaitable[User | None]],
        may_read: Callable[[User, str, str], Awaitable[bool]],
    ) -> None:
        self._view = view
        self._leadership = leadership
        self._review = review
        self._may_read = may_read

    def add_routes(self, app: web.Application) -> None:
        app.router.add_get(FLEET_PATH + "/{namespace}/{name}", self._handle)

    async def _handle(self, request: web.Request) -> web.Response:
        leadership = self._leadership()
        if not leadership.ready:
            return _error(503, "this replica does not lead: ask the leader", address=leadership.address)
        namespace, name = request.match_info["namespace"], request.match_info["name"]
        token = bearer_token(request)
        if not token:
            return _error(401, "no bearer token: send one of the API server's, as kubectl create token makes")
        try:
            user = await self._review(token, "")
            if user is None:
                return _error(401, "the API server does not know this token, or it has expired")
            allowed = await self._may_read(user, namespace, name)
        except KubeError as error:
            return _error(503, f"the API server can't be asked now: {error}")
        if not allowed:
            return _error(403, f"{user.name} may not get weightsyncs in namespace {namespace}")
        view = self._view((namespace, name))
        if view is None:
            return _error(
                404, f"there is no WeightSync {namespace}/{name}, or nothing was decided for it yet"
            )
        return web.Response(text=dumps(view), content_type="application/json")


def _error(status: int, message: str, **more: str) -> web.Response:
    return web.json_response({"error": message, **more}, status=status)
