"""Whether a library has the version that its private parts were tested with."""

import importlib.metadata


def untested(library: str, tested: str, check: str) -> str:
    """A warning if `library` has another version than `tested`; else empty.

    Args:
        library: name of the distribution.
        tested: its version up to the second number, such as 2.60.
        check: the command that tests the installed version.
    """
    version = importlib.metadata.version(library)
    if version.startswith(f"{tested}."):
        return ""
    return (
        f"{library} is {version}, but this program was tested with {tested}: "
        f"pip install '{library}=={tested}.*', or run {check}"
    )
