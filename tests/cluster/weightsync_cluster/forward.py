"""`python -IS forward.py DESCRIPTOR HOST PORT`: the API server's port, for the machine outside.

The descriptor is a socket that listens on the outer machine's loopback: a socket stays in the network
namespace in which it was made. What connects to it is passed on to HOST and PORT in the namespace in which
this program runs. So kubectl and tests need no way into the cluster's network, and nothing of the outer
machine's network changes.
"""

import asyncio
import contextlib
import socket
import sys

CHUNK_BYTES = 1 << 16
CONNECT_TIMEOUT_S = 5.0


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass bytes on until the end, and then the end: the other direction may go on."""
    while data := await reader.read(CHUNK_BYTES):
        writer.write(data)
        await writer.drain()
    writer.write_eof()


async def serve(listener: socket.socket, host: str, port: int) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            opened = asyncio.open_connection(host, port)
            there, here = await asyncio.wait_for(opened, CONNECT_TIMEOUT_S)
            with contextlib.suppress(OSError):
                await asyncio.gather(copy(reader, here), copy(there, writer))
            here.close()
        writer.close()

    async with await asyncio.start_server(connected, sock=listener) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2], int(sys.argv[3])))
