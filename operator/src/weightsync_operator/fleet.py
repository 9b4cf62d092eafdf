"""``GET /v1/weightsyncs/{namespace}/{name}``: the live fleet, for whoever may read the WeightSync itself.

Two kinds of tokens say who asks. One for the API server, in ``Authorization``, from who dials the operator. One
for the audience ``weightsync-fleet``, which is good for nothing else: it may go in a header of its own through
the API server's proxy, which takes ``Authorization`` off and does not check whom it proxies to.
"""

from collections.abc import Awaitable, Callable

from aiohttp import web

from weightsync_contract.codec import dumps
from weightsync_contract.fleetview import FleetView
from weightsync_contract.names import FLEET_AUDIENCE, FLEET_PATH, FLEET_TOKEN_HEADER
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
        bearer, own = bearer_token(request), request.headers.get(FLEET_TOKEN_HEADER, "")
        if not bearer and not own:
            return _error(401, f"no token: send one for audience {FLEET_AUDIENCE} as {FLEET_TOKEN_HEADER}")
        try:
            user, allowed = await self._who(bearer, own, namespace, name)
            if user is None:
                return _error(401, "the API server does not know this token, or it has expired")
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

    async def _who(self, bearer: str, own: str, namespace: str, name: str) -> tuple[User | None, bool]:
        """Who asks, and whether he may see it. Raises KubeError."""
        user = await self._review(bearer, "") if bearer else None
        if user is None:
            user = await self._review(own or bearer, FLEET_AUDIENCE)
            # Who makes tokens of a namespace's ServiceAccounts, or runs pods as them, speaks for the namespace.
            if user is not None and user.namespace == namespace:
                return user, True
        return user, user is not None and await self._may_read(user, namespace, name)


def _error(status: int, message: str, **more: str) -> web.Response:
    return web.json_response({"error": message, **more}, status=status)
