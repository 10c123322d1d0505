"""Many runs, many mistakes, one error: each said once, with the runs that it concerns."""


class Mistakes:
    """Collects errors over the members of a sweep, so that a user sees all of them at once."""

    def __init__(self) -> None:
        self._places: dict[str, list[str]] = {}

    def add(self, error: ValueError, place: str) -> None:
        for line in str(error).splitlines():
            places = self._places.setdefault(line, [])
            if place not in places:
                places.append(place)

    def raise_any(self, of: int) -> None:
        """Raise ValueError with one line for each mistake; a mistake of all `of` members names none of them."""
        if self._places:
            raise ValueError("\n".join(_line(message, places, of) for message, places in self._places.items()))


def _line(message: str, places: list[str], of: int) -> str:
    if len(places) == of:
        return message
    others = f" and {len(places) - 1} more" if len(places) > 1 else ""
    return f"{message} [{places[0]}{others}]"
