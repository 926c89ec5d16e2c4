"""What the hub of models and data sets says when it does not give something, in half a sentence each."""

from __future__ import annotations

from collections.abc import Iterator

_LONGEST = 240  # characters of another library's message


def cause_of(error: BaseException) -> str:
    """What an error of another library says, in one line; its class where it says nothing."""
    said = " ".join(str(error).split()).rstrip(".")
    return (said if len(said) <= _LONGEST else f"{said[:_LONGEST]}...") or type(error).__name__


def remedy_of(error: BaseException) -> str:
    """What to do when a model or data set could not be had.

    Args:
        error: what was raised; what it was raised from counts, too.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    causes = list(_chain(error))
    # `datasets` has an error of its own for both, and says in words which it is.
    if any(isinstance(cause, GatedRepoError) or "is a gated" in str(cause) for cause in causes):
        return "ask for access on its page on the hub, and log in with `hf auth login`"
    if any(isinstance(cause, RepositoryNotFoundError) or "doesn't exist" in str(cause) for cause in causes):
        return "mend the name, or log in with `hf auth login` where it is private"
    return "mend the name, or fetch it into the hub's cache where there is network"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
