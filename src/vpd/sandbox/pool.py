"""Runs a few programs at the same time and returns their outcomes in order."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from vpd.sandbox import Outcome, Program


def run_each(run: Callable[[Program], Outcome], programs: Sequence[Program], workers: int) -> list[Outcome]:
    """One outcome for each program, in order.  If one raises, programs that have not started are dropped."""
    if not programs:
        return []
    pool = ThreadPoolExecutor(min(workers, len(programs)), thread_name_prefix="sandbox")
    try:
        return list(pool.map(run, programs))
    finally:
        pool.shutdown(cancel_futures=True)
