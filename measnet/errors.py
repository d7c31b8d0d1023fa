"""What an error says, in one line of a message."""


def first_line(error: BaseException) -> str:
    """The first line of its text; its type if the text is empty."""
    return _lines(error)[0]


def last_line(error: BaseException) -> str:
    """The last line of its text, where a trace names the cause; its type if the text is empty."""
    return _lines(error)[-1]


def typed(error: BaseException) -> str:
    """The type and the first line of the text: `OSError: no space left`; the type alone if the text
    is empty."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"


def _lines(error: BaseException) -> list[str]:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines or [type(error).__name__]
