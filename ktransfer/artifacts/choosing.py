"""Which feature file of a run belongs to some images."""

from pathlib import Path

from ktransfer.artifacts.features import open_features
from ktransfer.errors import UsageError


def features_in(run: Path, fingerprint: str | None, who: str) -> Path | None:
    """The feature file of the run that was made of the images with this fingerprint, None where it has none.

    Args:
        fingerprint: where it is not given, of whatever images.
        who: what needs them, for messages.

    Raises:
        UsageError: there are several.
    """
    found = sorted((run / "features").glob("*.h5"))
    found = [path for path in found if fingerprint in (None, open_features(path).attributes.get("fingerprint"))]
    if len(found) > 1:
        names = ", ".join(str(path) for path in found)
        raise UsageError(f"{who}: the run has several feature files; choose one with --features: {names}")
    return found[0] if found else None
