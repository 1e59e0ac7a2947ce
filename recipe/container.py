"""What our container says of itself, in environment variables that the image and compose.yaml set."""

from __future__ import annotations

import os

from recipe.errors import UserError


def in_container() -> bool:
    """Whether this process runs in the recipe's own image."""
    return bool(os.environ.get("RECIPE_IMAGE_DIGEST"))


def require_network(missing: str, remedy: str, kind: type[UserError] = UserError) -> None:
    """Raises `kind` where this container was started without network, and `missing` would have to be fetched.

    Nothing is tried first: a container without network may take minutes to find out that it has none.
    """
    if os.environ.get("RECIPE_NETWORK") == "none":
        raise kind(f"{missing}, and this container has no network, by design; {remedy}")
