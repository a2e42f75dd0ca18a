"""The process that simulates or measures training methods.

``python -m glcan_fx.bench.methods``: a job as JSON on stdin, one message per method as a line of JSON on stdout. So a
method starts from a fresh allocator, and one that dies takes no other with it.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from typing import Any

from glcan_fx.bench.job import Job
from glcan_fx.bench.measured import measured
from glcan_fx.bench.simulated import estimates, row
from glcan_fx.errors import GlcanFxError, LoadError


def main() -> int:
    """Do the job on stdin."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what the user's model prints is none of the messages

    def send(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=channel, flush=True)

    given = json.load(sys.stdin)
    job = Job(**given["job"])
    try:
        if given["measure"]:
            [method] = given["methods"]
            send(row(method, partial(measured, job, method, given["blocks"])))
        else:
            for message in estimates(job, given["methods"]):
                send(message)
    except (GlcanFxError, OSError) as error:
        send({"fatal": str(error), "usage": isinstance(error, LoadError | OSError)})
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
