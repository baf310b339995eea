"""Checks of the exercises: a function for each, which computes the truth anew from the lesson's parameters.

It takes an answer, and returns a hint, or an empty text if the answer is right. Read this file after the exercise.
"""

from collections.abc import Callable
from typing import Any

from lesson import LESSON, make_student  # noqa: F401

CHECKS: dict[str, Callable[[Any], str]] = {}


def exercise(name: str) -> Callable[[Callable[[Any], str]], Callable[[Any], str]]:
    """Register the check of exercise ``name``, such as "00-1"."""

    def register(check: Callable[[Any], str]) -> Callable[[Any], str]:
        CHECKS[name] = check
        return check

    return register


def near(answer: Any, truth: float, tolerance: float, hint: str) -> str:
    """Return ``hint`` unless the answer is within ``tolerance`` of the truth."""
    return "" if abs(float(answer) - truth) <= tolerance else hint


# lesson 00
