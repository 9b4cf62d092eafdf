"""One event a line, as JSON or as text, through the standard library's logging.

``log = logs.get(__name__)``, then ``log.info("session opened", pod=..., seconds=...)``: the first argument is
a constant that can be searched for, everything that varies is a field. Records of other
libraries' loggers come out in the same form.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Final, TextIO

FORMATS: Final = ("json", "text")
_FIELDS: Final = "weightsync_fields"


class Log:
    """A logger whose calls take fields by keyword."""

    __slots__ = ("_logger",)

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def debug(self, event: str, **fields: Any) -> None:
        self._log(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: Any) -> None:
        self._log(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._log(logging.WARNING, event, fields)

    def error(self, event: str, **fields: Any) -> None:
        self._log(logging.ERROR, event, fields)

    def exception(self, event: str, **fields: Any) -> None:
        """An error with the traceback of the exception that is being handled."""
        self._log(logging.ERROR, event, fields, exc_info=True)

    def _log(self, level: int, event: str, fields: dict[str, Any], exc_info: bool = False) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, "%s", event, extra={_FIELDS: fields}, exc_info=exc_info)


def get(name: str) -> Log:
    """The logger of a module."""
    return Log(logging.getLogger(name))


def configure(form: str = "text", level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Send each record of the process to ``stream`` (default: standard error) in ``form``, one of FORMATS."""
    if form not in FORMATS:
        raise ValueError(f"log format {form!r} is none of {', '.join(FORMATS)}")
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Text())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        document = {
            **getattr(record, _FIELDS, {}),
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        if record.exc_info:
            document["traceback"] = self.formatException(record.exc_info)
        return json.dumps(document, default=str, separators=(",", ":"))


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, _FIELDS, {})
        line = f"{_time(record)} {record.levelname.lower():<7} {record.getMessage()}"
        for name, value in fields.items():
            text = str(value)
            line += (
                f" {name}={json.dumps(text) if ' ' in text or not text.isprintable() or not text else text}"
            )
        line = line.replace("\n", "\\n")
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line
