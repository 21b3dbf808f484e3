import pytest
from models import ConditionalQuadratic, gaussian

import ebmfast as ef
from ebmfast.expressions import ExpressionError

A = gaussian(0.0, 1.0, "a")
COLOR = ef.Family(ConditionalQuadratic(), "color", {"red": [1.0, 0.0], "blue": [0.0, 1.0]}, unconditional=True)
POSITION = ef.Family(ConditionalQuadratic(), "position", condition_dim=2)
MODELS = [A, COLOR, POSITION]


@pytest.mark.parametrize(("text", "expected"), [
    ("a", A),
    ("color('red') & ~position(0.5, -0.5)", COLOR("red") & ~POSITION(0.5, -0.5)),
    ("(a | color('red')) & position([0, 1])", (A | COLOR("red")) & POSITION(0, 1)),
    ("2 * a & color('blue') * 0.5", 2.0 * A & 0.5 * COLOR("blue")),
    ("negate(a | color('red'), alpha=0.2) & a", ef.negate(A | COLOR("red"), 0.2) & A),
    ("any_of([a, color('red')], log_weights=[0.5, -1], sharpness=2)", ef.any_of([A, COLOR("red")], [0.5, -1], 2)),
    ("all_of((a, color('red')), weights=[1, AboveSigma(0.5)])", ef.all_of([A, COLOR("red")], [1, ef.AboveSigma(0.5)])),
    ("with_prior(a & color('red'), color.unconditional)", ef.with_prior(A & COLOR("red"), COLOR.unconditional)),
    ("color[Slot('c')] & PiecewiseSigma([1], [0, 2]) * a", COLOR[ef.Slot("c")] & ef.PiecewiseSigma([1], [0, 2]) * A),
])
def test_the_language(text, expected):
    assert ef.parse(text, MODELS) == expected
    assert ef.parse(f"  {text} ", {m.name: m for m in MODELS}) == expected


@pytest.mark.parametrize(("text", "message"), [
    ("colr('red')", r"unknown name 'colr' \(did you mean color\?\)"),
    ("color('rde')", r"no label 'rde' \(did you mean 'red'\?\)"),
    ("a and color('red')", "write `&` instead of `and`"), ("a or a", r"write `\|` instead"), ("not a", "`~` negates"),
    ("a &", "not an expression: "), ("", "not an expression"), ("color & a", r"color needs a condition, as in color\(...\)"),
    ("color", r"write color\('red'\)"), ("position", r"write position\(0.5, 0.5\)"), ("3", "not a composition"),
    ("a + a", "compose"), ("a * a", "compose"), ("~3", "3 is not a concept"), ("-a", "`-` a number"),
    ("a.source", "only `.unconditional`"), ("color.__class__", "only `.unconditional`"), ("a[0]", "only a family is indexed"),
    ("color[0]", "takes an ef.Slot"), ("a()", "only families"), ("'x'()", "only families"),
    ("color(*[1, 2])", "Starred is not part"), ("all_of(**a)", "only families"), ("lambda: a", "Lambda is not part"),
    ("__import__('os').system('true')", "unknown name '__import__'"), ("[a for a in a]", "ListComp is not part"),
    ("color(True)", "True is not a number"), ("negate(a, alpha=-1)", "not be negative"), ("color(1, 2, 3)", "2 numbers"),
    ("any_of([])", "at least one"), ("negate(b=a)", "unexpected keyword"), ("~" * 3000 + "a", "not an expression"),
    ("a\0", "not an expression"),
])
def test_errors_say_what_and_where(text, message):
    with pytest.raises(ExpressionError, match=message):
        ef.parse(text, MODELS)


def test_errors_point_at_the_place():
    with pytest.raises(ExpressionError) as caught:
        ef.parse("color('red') & colr('blue')", MODELS)
    lines = str(caught.value).splitlines()
    assert lines[-2].index("colr") == lines[-1].index("^")
