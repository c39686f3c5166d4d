"""Reads the last answer tag of a text."""

OPEN, CLOSE = "<answer>", "</answer>"


def read_tag(text: str, form: str) -> tuple[str | None, str | None]:
    """(content of the last closed tag, fault of form), either may be None; ``form`` is the required form."""
    start = text.rfind(OPEN, 0, max(text.rfind(CLOSE), 0))
    end = text.find(CLOSE, start)
    if start < 0:
        if not text.strip():
            return None, f"Your answer is empty; it must end with {form}."
        if OPEN in text:
            return None, f"Your answer tag is not closed; write {form}."
        return None, f"Your answer has no answer tag; it must end with {form}."
    held = text[start + len(OPEN) : end].strip()
    if not held:
        return None, f"Your answer tag is empty; write {form}."
    return held, f"Text follows your {CLOSE}; nothing may." if text[end + len(CLOSE) :].strip() else None
