"""How what is refused is told."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from runtime.errors import DerainError


def refusal(function: Callable, *arguments, **options) -> str:
    with pytest.raises(DerainError) as error:
        function(*arguments, **options)
    message = str(error.value)
    assert "\n" not in message
    return message
