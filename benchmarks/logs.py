"""The library's log, out of the way of what the programs of the bench say on their standard output."""

from __future__ import annotations

import logging
import sys

import structlog


def to_stderr() -> None:
    """Say warnings, and on standard error."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
