"""Docstrings as Markdown: the sources write ``code`` and roles such as :func:`name`, as Python's own library does."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|mod|func|meth|attr|data|exc):`~?([^`]+)`")
CODE = re.compile(r"``(.+?)``", re.DOTALL)
DOCTEST = re.compile(r"(^>>> .*?)(?=\n\s*\n|\Z)", re.DOTALL | re.MULTILINE)


def as_markdown(text: str) -> str:
    """A docstring for a Markdown reader.

    >>> as_markdown("See :func:`vpd.train` and ``x``.")
    'See `vpd.train` and `x`.'
    """
    text = CODE.sub(r"`\1`", ROLE.sub(r"`\1`", text))
    return DOCTEST.sub(r"```pycon\n\1\n```", text)


class PlainDocstrings(griffe.Extension):
    """Rewrites every docstring when it is read."""

    def on_object(self, *, obj: griffe.Object, **others: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
