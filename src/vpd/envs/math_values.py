r"""Whether two values of a mathematical answer are equal: as written, as exact numbers, or by math-verify.

    normalised(r"\left( \dfrac12, x \right)")  # '(\\frac{1}{2},x)'
    number("1.5e3") == number(r"15 \times 10^{2}")  # Fraction(1500, 1)
    compare("5 km", "5 m")  # False; None: only math-verify can tell

A number is whatever whole numbers, decimals, e-notation and the signs ``+ - * / ^ \frac \times \cdot \div`` make.  Two
numbers are compared exactly, with two allowances: a relative difference of 1e-12 where one is no whole number (what a
binary float adds), and a decimal of at least six significant digits for a value that no decimal writes out, of which it
is the rounding (0.333333 for 1/3).

:func:`serve` runs in a :class:`~vpd.envs.worker.Worker`.  math-verify alone counts whatever is equal to six decimals,
or differs by less than 1e-15, as equal, so there its comparison of numbers is replaced by this module's.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

LONGEST = 400  # characters of a value
DIGITS = 6  # significant digits of a decimal that may stand for what it was rounded from
NOISE = Fraction(1, 10**12)  # relative; of binary floats
DEEPEST = 30  # nested brackets and powers
LARGEST = 20_000  # bits of a number that is computed here
DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
TOKEN = re.compile(rf"\\(?:frac|times|cdot|div|overline)|{DECIMAL}|[-+*/^(){{}}]", re.ASCII)
WRITTEN = {
    **dict.fromkeys("−–—‒﹣", "-"),
    **dict.fromkeys("×✕", r"\times "),
    **dict.fromkeys("⋅·∙", r"\cdot "),
    **dict.fromkeys("°º", r"^\circ "),
    "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ",
    "∩": r"\cap ", "∅": r"\emptyset ", "±": r"\pm ", "θ": r"\theta ", "⁄": "/", "∕": "/",
}  # fmt: skip
SUPERSCRIPTS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
#: units that answers are given in, by what they measure: how many of the first of each
UNITS: dict[str, dict[str, int | Fraction]] = {
    "length": {"m meter metre": 1, "km kilometer kilometre": 1000, "cm centimeter centimetre": Fraction(1, 100),
               "mm millimeter millimetre": Fraction(1, 1000), "inch inches": Fraction(254, 10_000),
               "ft foot feet": Fraction(3048, 10_000), "yd yard": Fraction(9144, 10_000),
               "mi mile": Fraction(1609344, 1000)},
    "mass": {"g gram": 1, "kg kilogram": 1000, "mg milligram": Fraction(1, 1000), "ton tonne": 1_000_000},
    "time": {"s sec second": 1, "min minute": 60, "h hr hour": 3600, "day": 86400, "week": 604800},
    "months": {"month": 1, "year": 12},
    "volume": {"l L liter litre": 1, "ml mL milliliter millilitre": Fraction(1, 1000)},
    "money": {"dollar": 1, "cent": Fraction(1, 100)},
    "force": {"N newton": 1}, "energy": {"J joule": 1, "kJ": 1000}, "power": {"W watt": 1, "kW": 1000},
    "frequency": {"Hz hertz": 1}, "voltage": {"V volt": 1}, "current": {"A ampere": 1},
}  # fmt: skip
MEASURES = {
    spelling: (what, Fraction(factor))
    for what, units in UNITS.items()
    for names, factor in units.items()
    for name in names.split()
    for spelling in (name, *([f"{name}s"] if len(name) > 2 else []))
}
ONE_UNIT = r"([A-Za-z]+)(?:\^\{?([1-3])\}?)?"
UNIT = re.compile(rf"(?<=[\d.)}}]){ONE_UNIT}(?:/{ONE_UNIT})?\Z", re.ASCII)
CLOCK = re.compile(r"(\d{1,2}):(\d\d)([ap])\.?m", re.ASCII)


def rewritten(value: str) -> str:
    r"""A value in plain LaTeX: other scripts' digits, vulgar fractions, signs and e-notation written out.

    >>> rewritten("5e-05"), rewritten("3½"), rewritten("９０°"), rewritten("pi/2, ")
    ('5\\times 10^{-05}', '3\\frac{1}{2}', '90^\\circ', '\\pi/2')
    """
    value = SUPERSCRIPTS.sub(lambda found: f"^{{{unicodedata.normalize('NFKC', found[0])}}}".replace("−", "-"), value)
    value = "".join(map(_plain_character, value))
    value = re.sub(r"√\s*(\d+|\w)", r"\\sqrt{\1}", value).replace("√", r"\sqrt ")
    value = re.sub(r"(?<![A-Za-z\\])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", value)
    value = re.sub(r"(?<![A-Za-z\\])(pi|sqrt)(?![A-Za-z])", r"\\\1", value).replace("**", "^")
    value = re.sub(rf"(?<![\w.\\])({DECIMAL})[eE]([+-]?\d+)(?![\w.])", r"\1\\times 10^{\2}", value, flags=re.ASCII)
    return re.sub(r"(?:\\?[\s.,;]|\\)+\Z", "", value.strip())


def _plain_character(character: str) -> str:
    if character.isascii():
        return character
    if character in WRITTEN:
        return WRITTEN[character]
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    plain = unicodedata.normalize("NFKC", character)
    if "⁄" in plain:  # a vulgar fraction
        above, _, below = plain.partition("⁄")
        return rf"\frac{{{above}}}{{{below}}}"
    return "" if unicodedata.category(character) == "Cf" else plain


def normalised(value: str) -> str:
    r"""A value without spaces and markup that do not change its meaning.

    >>> normalised(r"\left( \dfrac12, x \right)"), normalised(r"\$ 1{,}072.\!"), normalised(r"\text{ east }")
    ('(\\frac{1}{2},x)', '1072', 'east')
    """
    value = rewritten(value)
    value = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r"\1", value)
    value = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", value)
    value = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", value)
    value = re.sub(r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[!,;:\s()]|~|\^\{?\s*\\circ\s*\}?|\\?[$%]", "", value)
    value = "".join(value.split()).rstrip(".,").replace("{,}", ",")
    return value.replace(",", "") if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", value) else value


def number(value: str) -> Fraction | None:
    r"""The exact number that a value writes out, or None.

    >>> number(r"3\frac{1}{2}"), number(r"2^{-3}"), number(r"0.\overline{3}"), number("5e - 5"), number("x")
    (Fraction(7, 2), Fraction(1, 8), Fraction(1, 3), None, None)
    """
    return _computed(normalised(value)) if len(value) <= LONGEST else None


def _computed(text: str) -> Fraction | None:
    """The number that a normalised value writes out."""
    tokens = TOKEN.findall(text) if len(text) <= LONGEST else []
    if not tokens or "".join(tokens) != text:
        return None
    try:
        arithmetic = _Arithmetic(tokens)
        found = arithmetic.sum()
    except (ArithmeticError, IndexError, ValueError):
        return None
    return None if arithmetic.rest else found


class _Arithmetic:
    """Reads tokens from the left; raises ValueError or IndexError for what is no arithmetic."""

    def __init__(self, tokens: Sequence[str]):
        self.rest, self.depth = list(tokens), 0

    def next_is(self, *tokens: str) -> bool:
        return bool(self.rest) and self.rest[0] in tokens

    def sum(self) -> Fraction:
        total = self.product()
        while self.next_is("+", "-"):
            sign = self.rest.pop(0)
            total += self.product() if sign == "+" else -self.product()
        return _bounded(total)

    def product(self) -> Fraction:
        product = self.signed()
        while self.next_is("*", "/", r"\times", r"\cdot", r"\div"):
            times = self.rest.pop(0) not in ("/", r"\div")
            factor = self.signed()
            product = _bounded(product * factor if times else product / factor)
        return product

    def signed(self) -> Fraction:
        sign = 1
        while self.next_is("+", "-"):
            sign *= 1 if self.rest.pop(0) == "+" else -1
        return sign * self.power()

    def power(self) -> Fraction:
        self.deeper()
        base = self.atom()
        exponent = self.exponent()
        self.depth -= 1
        size = max(abs(base.numerator), base.denominator).bit_length()
        if exponent.denominator != 1 or abs(exponent) * size > LARGEST:
            raise ValueError
        return Fraction(base ** int(exponent))

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > DEEPEST:
            raise ValueError

    def exponent(self) -> Fraction:
        if not self.next_is("^"):
            return Fraction(1)
        self.rest.pop(0)
        return self.signed()

    def atom(self) -> Fraction:
        token = self.rest.pop(0)
        if token in ("(", "{"):
            inside = self.sum()
            if self.rest.pop(0) != {"(": ")", "{": "}"}[token]:
                raise ValueError
            return inside
        if token == r"\frac":
            self.deeper()
            above, below = self.atom(), self.atom()
            self.depth -= 1
            return above / below
        whole = Fraction(token)
        if self.next_is(r"\overline"):
            return whole + self._repeating(token)
        if token.isdigit() and self.rest[:2] == [r"\frac", "{"]:  # a mixed number
            return whole + self.atom()
        return whole

    def _repeating(self, before: str) -> Fraction:
        r"""The digits of ``0.1\overline{6}`` that repeat."""
        _, _, brace, digits, close = before, self.rest.pop(0), self.rest.pop(0), self.rest.pop(0), self.rest.pop(0)
        if "." not in before or (brace, close) != ("{", "}") or not digits.isdigit():
            raise ValueError
        return Fraction(int(digits), 10 ** len(before.partition(".")[2]) * (10 ** len(digits) - 1))


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator).bit_length() > LARGEST:
        raise ValueError
    return value


def equal(a: Fraction, b: Fraction, *, irrational: tuple[bool, bool] = (False, False)) -> bool:
    """Whether two numbers are equal (see the module's docstring for what is allowed); ``irrational``: the fraction is
    a near one of a number that has none."""
    if a == b:
        return True
    whole = a.denominator == b.denominator == 1
    noise = not whole and abs(a - b) <= NOISE * max(abs(a), abs(b))
    endless_a, endless_b = irrational[0] or _places(a) is None, irrational[1] or _places(b) is None
    return noise or (endless_b and not endless_a and _rounded_from(a, b)) or (endless_a and _rounded_from(b, a))


def _rounded_from(decimal: Fraction, exact: Fraction) -> bool:
    """Whether ``decimal`` is a decimal of enough digits, and the rounding of ``exact``."""
    places = _places(decimal)
    if places is None:
        return False
    digits = str(abs(decimal.numerator) * (10**places // decimal.denominator))
    return len(digits) >= DIGITS and abs(decimal - exact) <= Fraction(1, 2 * 10**places)


def _places(value: Fraction) -> int | None:
    """Decimal places that write a number out; None: none do, or more than a thousand."""
    rest, twos, fives = value.denominator, 0, 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    return max(twos, fives) if rest == 1 and max(twos, fives) <= 1000 else None


def compare(gold: str, value: str) -> bool | None:
    """Whether two values are equal as written or as numbers (with units); None if that does not tell."""
    written = normalised(gold), normalised(value)
    if written[0] == written[1]:
        return True
    clocks = [CLOCK.fullmatch(text.lower()) for text in written]
    if clocks[0] and clocks[1]:
        return clocks[0].groups() == clocks[1].groups()
    a, b = _measured(gold), _measured(value)
    if a is None or b is None or _perhaps_variables(a, b):
        return None
    if a.unit and b.unit:
        return a.measures == b.measures and equal(a.number * a.factor, b.number * b.factor)
    if a.percent != b.percent:  # 50% is 50 and 0.5
        part, whole = (a, b) if a.percent else (b, a)
        return equal(part.number, whole.number) or equal(part.number / 100, whole.number)
    return equal(a.number, b.number)


@dataclass(frozen=True, slots=True)
class _Measured:
    """A number with its unit ('' without one): what that measures, and its size in the first unit of the measure."""

    number: Fraction
    unit: str = ""
    measures: tuple[tuple[str, int], ...] = ()
    factor: Fraction = Fraction(1)
    percent: bool = False


def _perhaps_variables(a: _Measured, b: _Measured) -> bool:
    """Whether the only unit is a single letter, which may be a variable."""
    return len(a.unit + b.unit) == 1


def _measured(value: str) -> _Measured | None:
    """A number with its unit, if it has one; None for a value of another kind, or with an unknown unit."""
    plain, text = rewritten(value), normalised(value)
    found = _computed(text)
    if found is not None:
        dollars = _Measured(found, "dollar", (("money", 1),))
        return dollars if r"\$" in plain else _Measured(found, percent="%" in plain)
    unit_text = UNIT.search(text)
    if unit_text is None or (found := _computed(text[: unit_text.start()])) is None:
        return None
    factor = Fraction(1)
    measures: list[tuple[str, int]] = []
    for name, power, sign in ((unit_text[1], unit_text[2], 1), (unit_text[3], unit_text[4], -1)):
        known = MEASURES.get(name) or MEASURES.get(name.lower() if name and len(name) > 1 else "")
        if name and not known:
            return None
        if name and known:
            exponent = sign * int(power or 1)
            measures.append((known[0], exponent))
            factor *= known[1] ** exponent
    return _Measured(found, unit_text[0], tuple(measures), factor)


def same(gold: str, value: str) -> bool:
    """Whether two values are equal without math-verify."""
    return compare(gold, value) is True


def other_forms(value: str) -> list[str]:
    r"""A number's value, read by Python itself, in other forms: a quotient, a power of ten; empty for other values.

    >>> other_forms("5e-05"), other_forms("72"), other_forms("east")
    (['\\frac{1}{20000}', '5 \\times 10^{-5}'], ['72.0', '7.2 \\times 10^{1}'], [])
    """
    exact = _of_python(value)
    if exact is None or exact == 0:
        return []
    quotient = rf"\frac{{{exact.numerator}}}{{{exact.denominator}}}"
    forms = [f"{exact.numerator}.0" if exact.denominator == 1 else quotient]
    places = _places(exact)
    if places is not None:
        digits = str(abs(exact.numerator) * (10**places // exact.denominator))
        exponent = len(digits) - 1 - places
        shown = f"{digits[0]}.{digits[1:]}".rstrip("0").rstrip(".")
        forms.append(rf"{'-' * (exact < 0)}{shown} \times 10^{{{exponent}}}")
    return [form for form in forms if len(form) <= LONGEST]


def other_values(value: str) -> list[str]:
    """Numbers that are not a number's value: ten times it, and its negative; empty for other values."""
    exact = _of_python(value)
    if exact is None or exact == 0:
        return []
    forms = [rf"\frac{{{other.numerator}}}{{{other.denominator}}}" for other in (10 * exact, -exact)]
    return [form for form in forms if len(form) <= LONGEST]


def _of_python(value: str) -> Fraction | None:
    if len(value) > LONGEST or re.search(r"[eE][+-]?\d{4}", value):
        return None
    try:
        return Fraction(value)
    except (ValueError, ZeroDivisionError):
        return number(value)


def serve() -> Callable[[Sequence[str]], bool]:
    """In the worker: [right value, answered value] -> whether math-verify finds them equal.

    Only LaTeX is parsed, by a grammar; the time limit is the worker's, so math-verify's own alarms are off.
    """
    from math_verify import LatexExtractionConfig, grader, parse, verify
    from sympy import Eq

    by_places = grader.sympy_numeric_eq

    def numbers_equal(a: Any, b: Any, *places: int) -> bool:
        found = _sympy_equal(a, b)
        return by_places(a, b, *places) if found is None else found

    grader.sympy_numeric_eq = numbers_equal

    def read(value: str) -> Any:
        box = rf"\boxed{{{rewritten(value)}}}"
        return parse(box, [LatexExtractionConfig()], parsing_timeout=None, fallback_mode="no_fallback")

    def equal_values(pair: Sequence[str]) -> bool:
        gold, value = map(read, pair)
        if not gold or not value:
            return False
        if all(isinstance(found[0], Eq) for found in (gold, value)) and gold[0].lhs == value[0].lhs:
            gold, value = [gold[0].rhs], [value[0].rhs]
        return bool(verify(gold, value, timeout_seconds=None))

    return equal_values


def _sympy_equal(a: Any, b: Any) -> bool | None:
    """Whether two of sympy's numbers are equal; None for percentages and for what are no real numbers."""
    from sympy import Expr, Rational, UnevaluatedExpr

    if not all(isinstance(x, Expr) and x.is_number and not x.has(UnevaluatedExpr) for x in (a, b)):
        return None
    exact = [x.doit() for x in (a, b)]
    near = [x if isinstance(x, Rational) or x.is_Float else x.evalf(60) for x in exact]
    if not all(isinstance(x, Rational) or x.is_Float for x in near):
        return None
    irrational = (exact[0] is not near[0], exact[1] is not near[1])
    return equal(Fraction(str(near[0])), Fraction(str(near[1])), irrational=irrational)
