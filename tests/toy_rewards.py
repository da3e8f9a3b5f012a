"""Rewards for the tests' runs. Nothing heavy is imported: the processes that compute them start with this module."""


def parity(response: str, answer: str) -> float:
    """One that random responses earn half of the time, so that groups have advantages."""
    return float(len(response) % 2 == 0 or response > "5")


def failing_for_zero(response: str, answer: str) -> float:
    """Throws for one prompt."""
    if answer == "0":
        raise RuntimeError("no zero")
    return parity(response, answer)


def always_failing(response: str, answer: str) -> float:
    raise RuntimeError("never")


def failing(response: str, answer: str) -> float:
    """Hangs, throws and returns NaN, each for some responses."""
    while response.startswith("1"):
        pass
    if response.startswith("2"):
        raise RuntimeError("no")
    return float("nan") if response.startswith("3") else float(len(response) % 2)
