"""Standard streams that a run can go on with: nobody may read them, a user's code may close them."""

import contextlib
import io
import os
import sys
from typing import Any

FAREWELL = "vpd: the output reaches nobody any more ({reason}); the work goes on (Ctrl-C ends it)\n"


class Output(io.FileIO):
    """A standard stream that goes nowhere once its reader has gone (``vpd train | head``) or its disk is full.

    ``farewell`` is then written to standard error.
    """

    farewell = ""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            with contextlib.suppress(OSError):
                os.write(2, self.farewell.format(reason=error.strerror).encode())
            return len(data)


class _Stream(io.TextIOWrapper):
    """A standard stream that stays open: a user's code may close it, and the run has more to say."""

    def close(self) -> None:
        self.flush()


def keep_open() -> list[Output]:
    """Put an :class:`Output` under the standard streams, unless somebody else has replaced them; escapes, not errors,
    stand for what their encoding lacks."""
    outputs = []
    for name, original in (("stdout", sys.__stdout__), ("stderr", sys.__stderr__)):
        stream = getattr(sys, name)
        if stream is not original or not isinstance(stream, io.TextIOWrapper):
            continue
        output = Output(stream.fileno(), "w", closefd=False)
        buffer = io.BufferedWriter(output)
        replaced = _Stream(buffer, stream.encoding, "backslashreplace", line_buffering=True)
        setattr(sys, name, replaced)
        outputs.append(output)
    return outputs
