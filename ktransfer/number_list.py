"""Options that hold several numbers."""

from ktransfer.errors import UsageError


def number_list(flag: str, given: str, low: float, high: float, example: str) -> list[float]:
    """The numbers that a flag lists, separated by commas, each from `low` to `high`; above 0 where `low` is 0.

    Raises:
        UsageError: they are not.
    """
    try:
        found = [float(part) for part in given.split(",")]
    except ValueError:
        found = []
    if not found or not all(low <= number <= high and number > 0 for number in found):
        span = f"from {low:g} to" if low else "above 0 and up to"
        raise UsageError(f"{flag} {given}: must be numbers {span} {high:g} separated by commas, such as {example}")
    return found
