"""A few programs at a time, in order."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from vpd.sandbox import Outcome, Program


def run_each(run: Callable[[Program], Outcome], programs: Sequence[Program], workers: int) -> list[Outcome]:
    """Outcomes in order; where one raises, those not yet begun are dropped and the error goes on."""
    if not programs:
        return []
    pool = ThreadPoolExecutor(min(workers, len(programs)), thread_name_prefix="sandbox")
    try:
        return list(pool.map(run, programs))
    finally:
        pool.shutdown(cancel_futures=True)
