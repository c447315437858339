"""Runs a command and says its peak of anonymous memory, which leaves mapped files out (Linux).

python -m tests.weights.peak_memory dalle2 convert karlo FOLDER RUN
"""

import subprocess
import sys
import time
from pathlib import Path

SECONDS = 0.1


def anonymous(process: int) -> int:
    """Bytes of a process's memory that no file stands behind; 0 once it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def main() -> int:
    start, peak = time.monotonic(), 0
    with subprocess.Popen(sys.argv[1:]) as running:
        while running.poll() is None:
            peak = max(peak, anonymous(running.pid))
            time.sleep(SECONDS)
    print(f"peak of anonymous memory {peak / 2**30:.2f} GiB in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return running.returncode


if __name__ == "__main__":
    sys.exit(main())
