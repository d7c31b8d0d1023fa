"""What an error says in one line."""

from measnet.errors import first_line, last_line, typed


def test_an_error_says_its_first_or_last_line() -> None:
    error = ValueError("\n a picture is damaged\n\nTraceback\nOSError: no space left \n")
    assert first_line(error) == "a picture is damaged"
    assert last_line(error) == "OSError: no space left"
    assert typed(error) == "ValueError: a picture is damaged"


def test_an_error_without_a_text_is_named_by_its_type() -> None:
    assert first_line(KeyError()) == last_line(KeyError()) == "KeyError"
    assert typed(TimeoutError()) == "TimeoutError"
