import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlpost_rewards.language import LANGUAGES
from rlpost_rewards.text import METRICS, text

from rlpost.errors import JobError, RowError
from rlpost.reward import recorded
from rlpost.types import Task


def value(reply, answer=None, **arguments):
    task = Task(id="7", messages=(), answer=answer)
    score = text(task, recorded(task, reply), **arguments)
    assert score.parts == {arguments.get("check", "exact"): score.value}
    return score.value


def test_exact_folds_case_and_space_unless_told_not_to():
    assert value("  Hello \n world", "hello world") == 1.0
    assert value("Hello world", "hello world", fold=False) == 0.0
    assert value("e\u0301", "\u00e9", fold=False) == 1.0
    assert value("b", ["a", "b"]) == 1.0
    assert value("c", ["a", "b"]) == 0.0
    assert value("5", 5) == 1.0


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_similarity_grows_with_likeness(metric):
    near = value("the cat sat", "the cat sits", check="similarity", metric=metric)
    far = value("some dog ran", "the cat sits", check="similarity", metric=metric)
    assert 0.0 <= far < near < 1.0
    assert value("a b", ["zz", "A b"], check="similarity", metric=metric) == 1.0


def test_similarity_below_the_threshold_is_worth_nothing():
    assert value("the cat sat", "the cat sits", check="similarity", threshold=0.95) == 0.0


def test_a_pattern_has_to_match_the_whole_reply():
    assert value("AB-12", check="pattern", pattern="[A-Z]{2}-[0-9]+") == 1.0
    assert value("AB-12 or so", check="pattern", pattern="[A-Z]{2}-[0-9]+") == 0.0
    assert value("b", check="pattern", pattern="a|b") == 1.0
    assert value("ab", check="pattern", pattern="a|b") == 0.0


def test_a_pattern_takes_linear_time():
    start = time.perf_counter()
    assert value("a" * 200_000 + "!", check="pattern", pattern="(a+)+") == 0.0
    assert time.perf_counter() - start < 2
    for pattern in (r"(a)\1", "(?=a)b", "((", "(a{1000}){1000}"):
        with pytest.raises(JobError, match="linear time"):
            value("a", check="pattern", pattern=pattern)


@pytest.mark.parametrize(
    ("words", "expected"), [(0, 0.0), (2, 0.5), (4, 1.0), (8, 1.0), (12, 0.5), (16, 0.0), (99, 0.0)]
)
def test_length_falls_outside_its_bounds(words, expected):
    assert value("w " * words, check="length", least=4, most=8) == pytest.approx(expected)


def test_length_counts_characters_when_asked_to():
    assert value("abcd", check="length", most=2, unit="characters") == 0.0
    assert value("abc", check="length", most=3, unit="characters") == 1.0


@pytest.mark.parametrize(
    ("reply", "language", "expected"),
    [
        ("Привет!", "cyrillic", 1.0),
        ("hello", "cyrillic", 0.0),
        ("こんにちは世界", "ja", 1.0),
        ("世界", "zh", 1.0),
        ("ab 世界", "zh", 0.5),
        ("Ａｂ", "latin", 1.0),
        ("123", "latin", 0.0),
    ],
)
def test_language_is_told_by_script(reply, language, expected):
    assert value(reply, check="language", language=language) == pytest.approx(expected)


SENTENCES = {
    "en": "The goods were sent to our warehouse and the invoice is attached to this letter.",
    "de": "Die Ware wurde an unser Lager geschickt und die Rechnung ist dem Brief beigefügt.",
    "fr": "La marchandise est partie pour notre entrepôt et la facture est dans cette lettre.",
    "es": "La mercancía fue enviada al almacén y la factura está en esta carta para usted.",
    "it": "La merce è stata spedita al magazzino e la fattura è nella lettera con il modulo.",
    "pt": "A mercadoria foi enviada para o armazém e a fatura está na carta com os papéis.",
    "nl": "De goederen zijn naar het magazijn gestuurd en de factuur is bij deze brief gevoegd.",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_a_sentence_scores_best_in_its_own_language(language):
    values = {
        other: value(SENTENCES[language], check="language", language=other) for other in SENTENCES
    }
    assert max(values, key=values.get) == language
    assert values[language] > 0.85
    assert all(v < 0.8 for other, v in values.items() if other != language), values


def test_what_no_function_word_tells_is_half_right_and_another_script_wrong():
    assert value("Tan Woon Yann", check="language", language="en") == 0.5
    assert value("это моя книга", check="language", language="en") == 0.0


def test_a_language_that_is_not_known_is_refused():
    with pytest.raises(JobError, match="'tlh' cannot be told"):
        value("hello", check="language", language="tlh")


def test_repetition_lowers_the_share_of_different_runs():
    fresh = "one two three four five six seven eight"
    assert value(fresh, check="repetition") == 1.0
    assert value("go on " * 100, check="repetition") < 0.05
    assert value("哈" * 400, check="repetition") < 0.05
    assert value("", check="repetition") == 0.0


def test_bad_arguments_and_rows_are_named():
    for arguments in (
        {"check": "taste"},
        {"check": "similarity", "metric": "love"},
        {"check": "pattern"},
        {"check": "length", "unit": "pages"},
        {"check": "length", "least": 5, "most": 4},
        {"thinking": "drop"},
    ):
        with pytest.raises(JobError):
            value("a", "a", **arguments)
    for answer in (None, [], {"a": 1}, ["a", None]):
        with pytest.raises(RowError, match="row 7"):
            value("a", answer)


def test_long_replies_are_measured_in_bounded_time():
    start = time.perf_counter()
    reply = "ab " * 3_000_000
    assert value(reply, "ab", check="similarity") == 0.0
    assert value(reply, check="repetition") < 0.01
    assert value(reply, check="language", language="latin") == 1.0
    assert time.perf_counter() - start < 5


checks = st.sampled_from(
    [
        {"check": "exact"},
        *({"check": "similarity", "metric": metric} for metric in METRICS),
        {"check": "pattern", "pattern": "a+"},
        {"check": "length", "least": 2, "most": 3},
        *({"check": "language", "language": language} for language in LANGUAGES),
        {"check": "repetition"},
    ]
)


@given(st.text(st.characters()), checks)
def test_any_text_gets_a_score(reply, arguments):
    assert 0.0 <= value(reply, "a", **arguments) <= 1.0
