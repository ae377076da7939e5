"""The hub of models: whether it can be asked for what is not on this machine yet."""

from huggingface_hub import constants, get_session, try_to_load_from_cache

from guidekit.errors import GuidekitError

PATIENCE = 5.0  # seconds for one answer; the hub's own client tries for most of a minute


def require_hub(repo: str, *files: str) -> None:
    """Raises GuidekitError unless one of the files is in the hub's cache, or the hub has `repo`.

    One request, without another try, so that a machine without a network is told at once.
    """
    if any(isinstance(try_to_load_from_cache(repo, file), str) for file in files):
        return
    where = f"{repo!r} is not in the hub's cache {constants.HF_HUB_CACHE}"
    if constants.is_offline_mode():
        raise GuidekitError(f"{where}, and HF_HUB_OFFLINE keeps the hub away; check its name")
    try:
        answer = get_session().get(f"{constants.ENDPOINT}/api/models/{repo}", timeout=PATIENCE)
    except Exception as error:  # the client's own, of whichever library it is built on
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise GuidekitError(
            f"{where}, and {constants.ENDPOINT} does not answer ({first}); check the network, or "
            f"run hf download {repo} where there is one"
        ) from None
    if answer.status_code in (401, 403, 404):
        raise GuidekitError(
            f"{constants.ENDPOINT} has no {repo!r} that this account may read; check its name, or "
            "log in with hf auth login"
        )
