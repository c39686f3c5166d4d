"""Runs inside the sandbox, as ``main.py`` beside ``solution.py``: a whole program, or calls of one function.

``order.json`` says which; standard input is the program's own.  No expected value ever comes here: the program under
test shares this interpreter and may read and change all of it.  What it can forge is a returned *value*, which the
caller compares with one that was never here.

Imported by the caller too, for :func:`encode` and :func:`decode`: values that JSON alone would change (tuples, sets,
dictionaries with other keys than text, floats that are no numbers) travel as ``{"kind": parts}``.
"""

from __future__ import annotations

import json
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MOST_SHARED = 64  # keys of one hash; made at random, two are rare
PRELUDE = """
import bisect, collections, copy, functools, heapq, itertools, math, operator, re, string, sys
from bisect import bisect, bisect_left, bisect_right, insort
from collections import Counter, OrderedDict, defaultdict, deque
from functools import cache, cmp_to_key, lru_cache, reduce
from heapq import heapify, heappop, heappush, heappushpop, heapreplace, nlargest, nsmallest
from itertools import accumulate, chain, combinations, count, groupby, islice, permutations, product
from math import ceil, comb, factorial, floor, gcd, inf, isqrt, lcm, log, log2, sqrt
from typing import *
sys.setrecursionlimit(50_000)
"""


def encode(value: Any) -> Any:
    """A value of plain types as JSON's own; raises TypeError for any other."""
    if value is None or isinstance(value, (bool, str)):
        return value if value is None or isinstance(value, bool) else str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if value - value == 0 else {"float": repr(float(value))}
    if isinstance(value, list):
        return [encode(part) for part in value]
    for kind, name in ((tuple, "tuple"), (frozenset, "set"), (set, "set")):
        if isinstance(value, kind):
            return {name: [encode(part) for part in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(part)] for key, part in value.items()]}
    if type(value).__module__ == "numpy":
        return encode(value.tolist())
    raise TypeError(type(value).__name__)


def decode(form: Any) -> Any:
    """The value of a form; raises ValueError or TypeError for what :func:`encode` does not make."""
    if isinstance(form, list):
        return [decode(part) for part in form]
    if not isinstance(form, dict):
        return form
    [(kind, parts)] = form.items()
    if kind == "float":
        return float(parts)
    if kind == "tuple":
        return tuple(decode(part) for part in parts)
    if kind == "set":
        return set(_spread([decode(part) for part in parts]))
    if kind == "dict":
        keys = _spread([decode(key) for key, _ in parts])
        return dict(zip(keys, [decode(part) for _, part in parts], strict=True))
    raise ValueError(kind)


def _spread(keys: list[Any]) -> list[Any]:
    """The keys; raises ValueError where many share one hash, as a set of them would take quadratic time to build."""
    shared: dict[int, int] = {}
    for key in keys:
        shared[hash(key)] = shared.get(hash(key), 0) + 1
    if max(shared.values(), default=0) > MOST_SHARED:
        raise ValueError("keys that share one hash")
    return keys


def main() -> None:
    with open("order.json", encoding="utf-8") as file:
        order = json.load(file)
    with open("solution.py", encoding="utf-8", errors="surrogatepass") as file:
        source = file.read()
    name = "__main__" if order["function"] is None else "solution"
    module = type(sys)(name)
    module.__file__ = "solution.py"
    driver = sys.modules["__main__"]  # kept alive: its functions run on
    sys.modules[name] = module
    names = module.__dict__
    exec(PRELUDE, names)
    code = compile(source, "solution.py", "exec", dont_inherit=True)
    if order["function"] is None:
        sys.tracebacklimit = 16
        exec(code, names)
        return
    results = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the program prints is no result
    exec(code, names)
    results.write(f"{order['nonce']} ready\n")
    results.flush()
    for number, line in enumerate(order["calls"]):
        results.write(f"{order['nonce']} {number} {json.dumps(answer(names, order['function'], line))}\n")
        results.flush()
    if order["test"]:
        exec(compile(order["test"], "test.py", "exec"), names)
        results.write(f"{order['nonce']} 0 {json.dumps({'value': True})}\n")
        results.flush()
    del driver


def answer(names: dict[str, Any], function: str, arguments: Any) -> dict[str, Any]:
    """One call: its value, or what went wrong with it."""
    holder = names.get("Solution")
    if function not in names and not (isinstance(holder, type) and hasattr(holder, function)):
        return {"missing": function}
    try:
        called = names[function] if function in names else getattr(holder(), function)  # type: ignore[misc]
        value = called(*decode(arguments))
    except BaseException:
        import traceback

        return {"raised": traceback.format_exc(limit=-16)[-8000:]}
    try:
        return {"value": encode(value)}
    except (TypeError, RecursionError):
        return {"odd": type(value).__name__}


if __name__ == "__main__":
    main()
