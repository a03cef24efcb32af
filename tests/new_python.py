"""Code in a process of its own."""

import os
import subprocess
import sys


def in_new_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Settings such as PSSL_SIMD and PSSL_KEEP_MIB are read once in each."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
