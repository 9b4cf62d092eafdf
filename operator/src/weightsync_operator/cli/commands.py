"""What each command does: ask, show, wait, and say how it ended."""

import argparse
import asyncio
import json
import secrets
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from typing import Any, Final

from rich.console import Console
from rich.live import Live as Screen

from weightsync_operator.cli import show
from weightsync_operator.cli.cluster import Cluster
from weightsync_operator.cli.core.exits import Exit
from weightsync_operator.cli.core.outlook import Verdict, judge
from weightsync_operator.cli.core.page import Page, make_page
from weightsync_operator.cli.core.verbs import Ask, Verb, VerbError, answered, ask
from weightsync_operator.cli.live import Live, NoViewError, Operator, find_operator
from weightsync_operator.kube.errors import KubeError, NotFoundError, UnavailableError

_PERIOD: Final = 0.5
_WIDTH: Final = 160


class Commands:
    """The commands against one cluster. Each answers an exit code and may raise KubeError or VerbError."""

    def __init__(self, given: argparse.Namespace, cluster: Cluster) -> None:
        self._given, self._cluster = given, cluster
        self._json = given.output == "json"
        # A pipe has no width: nothing is cut there.
        self._out = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)

    async def run(self) -> Exit:
        """Whatever was asked for."""
        command = self._given.command
        if command == "status":
            return await self._status()
        if command == "get" and self._given.watch:
            return await self._watch()
        if command == "get":
            return await self._get()
        if command == "doctor":
            from weightsync_operator.cli.examine import examine

            found = await examine(self._cluster, self._given)
            self._print(found, lambda: show.findings(found))
            return Exit.FAILED if any(each.level == "problem" for each in found) else Exit.DONE
        return await self._verb(Verb(command))

    async def _status(self) -> Exit:
        page = await self._page(await self._live())
        self._print(page, lambda: show.page(page))
        return Exit.DONE

    async def _get(self) -> Exit:
        if self._given.name:
            documents = [await self._cluster.weightsync(self._given.name)]
        else:
            documents = await self._cluster.weightsyncs(self._given.all_namespaces)
        pages = [make_page(each, None, None, _now()) for each in documents]
        if not pages and not self._json:
            where = "the cluster" if self._given.all_namespaces else f"namespace {self._cluster.namespace}"
            print(f"there is no WeightSync in {where}", file=sys.stderr)
            return Exit.DONE
        self._print(pages, lambda: show.overview(pages, self._given.all_namespaces))
        return Exit.DONE

    async def _watch(self) -> Exit:
        live = await self._live()
        deadline = self._deadline()
        terminal = sys.stdout.isatty() and not self._json
        shown: Any = None
        with Screen(console=self._out, auto_refresh=False) if terminal else nullcontext() as screen:
            while True:
                verdict, page = await self._look(live)
                if page is not None and screen is not None:
                    screen.update(show.page(page), refresh=True)
                elif page is not None:
                    text = show.as_json(page) if self._json else show.line(page)
                    if text != shown:
                        print(text, flush=True)
                    shown = text
                if verdict is not None:
                    break
                if time.monotonic() >= deadline:
                    verdict = Verdict(Exit.TIMEOUT, f"not done after {self._given.timeout:g} s")
                    break
                await asyncio.sleep(_PERIOD)
        print(verdict.message, file=sys.stderr)
        return verdict.exit

    async def _look(self, live: Live) -> tuple[Verdict | None, Page | None]:
        try:
            document = await self._cluster.weightsync(self._given.name)
        except UnavailableError as error:
            # An API server that restarts is no end of a rollout.
            print(error, file=sys.stderr)
            return None, None
        page = await self._page(live, document)
        return judge(document, page.phase if page.live else ""), page

    async def _verb(self, verb: Verb) -> Exit:
        name = self._given.name
        before = await self._cluster.weightsync(name)
        asked = ask(verb, before, getattr(self._given, "of", ""), secrets.token_hex(3))
        after = await self._cluster.patch(name, asked.patch)
        if self._given.no_wait:
            return self._end(asked, Verdict(Exit.DONE, "asked for"))
        deadline = self._deadline()
        while (verdict := answered(asked, after)) is None:
            if time.monotonic() >= deadline:
                late = f"no answer within {self._given.timeout:g} s: does an operator run? weightsync doctor tells"
                return self._end(asked, Verdict(Exit.TIMEOUT, late))
            await asyncio.sleep(_PERIOD)
            try:
                after = await self._cluster.weightsync(name)
            except UnavailableError as error:
                print(error, file=sys.stderr)
        return self._end(asked, verdict)

    def _end(self, asked: Ask, verdict: Verdict) -> Exit:
        name = f"{self._cluster.namespace}/{self._given.name}"
        if self._json:
            answer = {"weightsync": name, "verb": asked.verb, "about": asked.about, "exit": int(verdict.exit)}
            print(json.dumps({**answer, "message": verdict.message}))
        else:
            stream = sys.stdout if verdict.exit is Exit.DONE else sys.stderr
            print(f"{name}: {asked.verb} {asked.about}: {verdict.message}", file=stream)
        return verdict.exit

    async def _live(self) -> Live:
        operator: Operator = await find_operator(
            self._cluster, self._given.operator, self._given.operator_url
        )
        return Live(self._cluster, operator, self._given.service_account)

    async def _page(self, live: Live, document: dict[str, Any] | None = None) -> Page:
        document = document or await self._cluster.weightsync(self._given.name)
        pods = await self._cluster.selected_pods(document)
        try:
            view = await live.view(self._given.name)
        except NoViewError as error:
            return make_page(document, None, pods, _now(), str(error))
        return make_page(document, view, pods, _now())

    def _deadline(self) -> float:
        return time.monotonic() + self._given.timeout if self._given.timeout else float("inf")

    def _print(self, value: Any, rendered: Callable[[], Any]) -> None:
        if self._json:
            print(show.as_json(value))
        else:
            self._out.print(rendered())


def _now() -> datetime:
    return datetime.now(UTC)


async def run(given: argparse.Namespace) -> Exit:
    """Run a command; trouble is said on standard error."""
    try:
        cluster = Cluster(given.kubeconfig, given.context, given.namespace)
        try:
            return await Commands(given, cluster).run()
        finally:
            cluster.close()
    except VerbError as error:
        print(f"{given.command}: {error}", file=sys.stderr)
        return Exit.USAGE
    except NotFoundError as error:
        print(
            f"{error}: is there such a WeightSync, and are the CRDs installed? weightsync get -A",
            file=sys.stderr,
        )
        return Exit.UNREACHABLE
    except KubeError as error:
        print(error, file=sys.stderr)
        return Exit.UNREACHABLE
