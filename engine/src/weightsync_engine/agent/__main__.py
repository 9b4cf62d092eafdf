"""``python -m weightsync_engine.agent``."""

import asyncio
import logging
import signal
import sys

from weightsync_contract import logs
from weightsync_contract.reasons import Role
from weightsync_engine.adapter import HttpEngine
from weightsync_engine.agent.agent import Agent
from weightsync_engine.agent.config import Config, parse

log = logs.get("weightsync_engine.agent")


def main() -> None:
    """Run an agent until SIGTERM or SIGINT."""
    config = parse()
    logs.configure(config.log_format, logging.getLevelNamesMapping()[config.log_level])
    try:
        asyncio.run(_run(config))
    except OSError as error:
        log.error("agent can't run", why=error)
        sys.exit(1)


async def _run(config: Config) -> None:
    if config.role is Role.TRAINER:
        await serve(Agent(config, None))
        return
    async with HttpEngine(config.engine_url, config.directory) as engine:
        await serve(Agent(config, engine))


async def serve(agent: Agent) -> None:
    """Run the agent until it is told to end."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, agent.stop)
    await agent.run()


if __name__ == "__main__":
    main()
