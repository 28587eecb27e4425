"""What is said of an evaluation, against figures worked out by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from report_run import LONG_RESULT, RESULT

from lit_thought.patch.verdict import headline, is_long, warnings

FINE: dict[str, Any] = {
    **LONG_RESULT,
    "checked": {"plain": 0.0, "instructed": 0.5, "patched": 0.4},
    "own_text": {
        **LONG_RESULT["own_text"],
        "kl": 0.3,
        "repetition": {"plain": 0.9, "instructed": 0.25, "patched": 0.35},
        "loops": {"plain": 0.9, "instructed": 0.15, "patched": 0.25},
        "length": {"plain": 1.0, "instructed": 20.0, "patched": 25.0},
    },
    "prompt_tokens": {"plain": 36.0, "instructed": 36.5, "saved": 0.5},
}
"""At the edge of every warning, and not over it."""


def changed(path: str, value: Any) -> dict[str, Any]:
    result = copy.deepcopy(FINE)
    *way, last = path.split(".")
    place = result
    for key in way:
        place = place[key]
    place[last] = value
    return result


def test_headline_is_chosen_for_the_job() -> None:
    assert headline(RESULT) == {
        "key": "accuracy",
        "label": "accuracy, patched",
        "value": "0.75",
        "note": "instructed 0.75, plain 0.25",
    }
    long = headline(LONG_RESULT)
    assert (long["key"], long["label"]) == ("difference", "difference to the instructed model")
    assert long["value"] == "down by 85 %"  # 1 − 0.06 ÷ 0.4
    assert long["note"] == "KL from 0.400 to 0.060 nats a token along its outputs"
    assert headline(changed("output_kl", {"plain": 0.4, "patched": 0.5}))["value"] == "up by 25 %"
    assert headline(changed("accuracy", RESULT["accuracy"]))["key"] == "accuracy"
    for short in (
        {**RESULT, "accuracy": None},  # of a file that does not say how long outputs are
        changed("own_text.length.instructed", 8.0),
        changed("output_kl", {"plain": 0.0, "patched": 0.0}),
        changed("output_kl", {"plain": None, "patched": float("nan")}),
    ):
        assert headline(short)["key"] == "fidelity"
    assert headline({**RESULT, "accuracy": None})["note"] == "plain 0.00"
    assert headline({**RESULT, "accuracy": None, "fidelity_plain": None})["note"] == ""


def test_outputs_are_long_above_eight_tokens() -> None:
    assert [is_long(changed("own_text.length.instructed", length)) for length in (8.0, 8.1)] == [False, True]
    assert not is_long(RESULT)


def test_every_warning_has_its_figures() -> None:
    assert list(warnings(LONG_RESULT).values()) == [
        "As it is used, the patch does worse: KL to the instructed model is 1.500 nats a token on the text that the "
        "patched model writes, 0.060 along the instructed outputs. Read what it writes.",
        "The patched outputs repeat themselves: 0.25 of their 3-grams came before, of those of the instructed ones "
        "0.01.",
        "The patched outputs are longer than the instructed ones: 20.5 tokens on average, not 9.5.",
        "Of the patched outputs 0.50 pass the check, of the instructed ones 1.00.",
        "The patch saves no tokens: prompts have 36.0 without the chunk and 31.5 with it. (Many a chat template writes "
        "a system message of its own where there is none.)",
    ]


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("own_text.kl", 0.301, "As it is used"),  # 5 × 0.06
        (
            "own_text.loops.patched",
            0.251,
            "0.25 loop (most of their 3-grams came before), of the instructed ones 0.15.",
        ),
        ("own_text.repetition.patched", 0.351, "repeat themselves"),
        ("own_text.repetition.instructed", None, "repeat themselves"),
        ("own_text.length.patched", 25.1, "are longer"),
        ("own_text.length.patched", 14.9, "are shorter"),
        ("checked.patched", 0.39, "pass the check"),
        ("prompt_tokens.instructed", 36.0, "saves no tokens"),
    ],
)
def test_warnings_begin_where_they_are_said_to(path: str, value: Any, said: str) -> None:
    assert warnings(FINE) == {}
    (sentence,) = warnings(changed(path, value)).values()
    assert said in sentence


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("output_kl", {"plain": 0.29, "patched": 0.06}),  # fell by 79 %: nothing that looks good
        ("own_text.length", {"plain": 1.0, "instructed": 2.0, "patched": 3.0}),  # a token more
        ("own_text.kl", None),
        ("own_text.repetition.patched", None),
        ("own_text.length.instructed", 0.0),
        ("checked", None),
        ("own_text", None),
    ],
)
def test_no_warning_without_cause(path: str, value: Any) -> None:
    result = changed(path, value)
    if path == "output_kl":
        result["own_text"]["kl"] = 10.0
    assert warnings(result) == {}


def test_of_outputs_that_loop_it_is_not_said_twice_that_they_repeat_themselves() -> None:
    result = changed("own_text.loops.patched", 0.9)
    result["own_text"]["repetition"]["patched"] = 0.9
    assert list(warnings(result)) == ["loops"]


def test_files_from_before_have_no_warnings() -> None:
    assert warnings(RESULT) == {}
