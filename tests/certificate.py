"""A certificate for localhost that signs itself, for the tests of TLS."""

from __future__ import annotations

import subprocess
from pathlib import Path


def make_certificate(directory: Path) -> Path:
    """Put a `cert.pem` and its `key.pem` into the directory, and return that."""
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -keyout key.pem -out cert.pem"
        " -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    subprocess.run(command.split(), cwd=directory, check=True, capture_output=True, timeout=60)
    return directory
