"""Real agents that dial over TLS with the bundle that the operator publishes, and what brings it to them."""

import asyncio
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from cluster_objects import ClusterObjects
from kubernetes.client.exceptions import ApiException

from weightsync_contract.messages import PodRef
from weightsync_contract.names import CA_FILE, CA_NAME

SECONDS = 30.0


class Bundles:
    """The namespace's ConfigMap and Secret, and a stand-in for the kubelet: the file comes ``lag`` seconds late."""

    def __init__(self, objects: ClusterObjects, file: Path, lag: float = 0.0) -> None:
        self.objects = objects
        self.file = file
        self._lag = lag

    def configmap(self) -> Any:
        return _or_none(self.objects.core.read_namespaced_config_map, CA_NAME, self.objects.namespace)

    def secret(self) -> Any:
        return _or_none(self.objects.core.read_namespaced_secret, CA_NAME, self.objects.namespace)

    async def until(self, condition: Any, what: str, seconds: float = SECONDS) -> Any:
        """The ConfigMap, once it is there and as wanted."""
        deadline = asyncio.get_running_loop().time() + seconds
        while True:
            found = await asyncio.to_thread(self.configmap)
            if found is not None and condition(found):
                return found
            assert asyncio.get_running_loop().time() < deadline, f"no ConfigMap {what}: {found}"
            await asyncio.sleep(0.05)

    @asynccontextmanager
    async def mounted(self) -> AsyncIterator[None]:
        """Keep the file as the kubelet would."""
        task = asyncio.create_task(self._mount())
        try:
            await _eventually(self.file.exists, "the bundle's file")
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _mount(self) -> None:
        before = None
        while True:
            found = await asyncio.to_thread(self.configmap)
            text = (found.data or {}).get(CA_FILE) if found else None
            if text and text != before:
                await asyncio.sleep(self._lag if before else 0.0)
                self._replace(text)
                before = text
            await asyncio.sleep(0.1)

    def _replace(self, text: str) -> None:
        part = self.file.with_suffix(".part")
        part.write_text(text)
        part.replace(self.file)


class TrustingAgent:
    """A trainer's agent, which needs no engine, as a process."""

    def __init__(self, directory: Path, url: str, pod: PodRef, token: str, bundle: Path | None) -> None:
        directory.mkdir()
        self._log = directory / "log"
        token_file = directory / "token"
        token_file.write_text(token)
        self._command = [
            *(sys.executable, "-m", "weightsync_engine.agent", "--role", "trainer", "--operator", url),
            *(("--operator-ca", str(bundle)) if bundle else ()),
            *("--token-file", str(token_file), "--namespace", pod.namespace, "--pod-name", pod.name),
            *("--pod-uid", pod.uid, "--pod-ip", "127.0.0.1"),
            *("--directory", str(directory / "shared"), "--state-directory", str(directory / "state")),
        ]

    @asynccontextmanager
    async def running(self) -> AsyncIterator["TrustingAgent"]:
        with self._log.open("wb") as log:
            process = await asyncio.create_subprocess_exec(*self._command, stdout=log, stderr=log)
        try:
            yield self
        finally:
            process.kill()
            await asyncio.wait_for(process.wait(), SECONDS)

    def log(self) -> str:
        return self._log.read_text()

    def count(self, text: str) -> int:
        return self.log().count(text)

    async def until_said(self, text: str, times: int = 1) -> None:
        await _eventually(lambda: self.count(text) >= times, text, self.log)


def handshake(
    address: str, bundle: str, name: str = "", newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
) -> dict[str, Any]:
    """Dial ``host:port``; answers the certificate. Raises OSError, as ssl.SSLError, when that is refused."""
    import socket

    context = ssl.create_default_context(cadata=bundle)
    context.maximum_version = newest
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=name or host) as secured,
    ):
        certificate = secured.getpeercert()
        assert certificate
        return dict(certificate)


def _or_none(read: Any, *arguments: str) -> Any:
    try:
        return read(*arguments)
    except ApiException as error:
        if error.status != 404:
            raise
        return None


async def _eventually(condition: Any, what: str, more: Any = lambda: "") -> None:
    deadline = asyncio.get_running_loop().time() + SECONDS
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"not within {SECONDS:g} s: {what}\n{more()}"
        await asyncio.sleep(0.05)
