"""Why transformers could not read a model, a configuration or a tokenizer, and what to do."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.errors import ModelError


def unreadable(source: str, error: BaseException, *, what: str = "the model") -> ModelError:
    """Return the error for what transformers could not load.

    Args:
        source: the folder or hub id.
        error: what transformers raised.
        what: the part that was wanted.
    """
    problem = f"{what} cannot be loaded: {_first_line(error)}"
    return ModelError(problem, where=source, fix=_fix(source, error))


def access_fix(page: str, error: BaseException) -> str | None:
    """Return what to do when the hub gave no access; ``None`` when that is not the reason.

    Args:
        page: below https://huggingface.co/, where a licence is accepted.
        error: what a library raised, with its causes.
    """
    from huggingface_hub import errors

    causes = tuple(_causes(error))
    # datasets 4 does not keep the causes (load.py:dataset_module_factory).
    is_gated = "is a gated dataset" in str(error)
    is_hidden = "doesn't exist on the Hub or cannot be accessed" in str(error)
    if is_gated or any(isinstance(cause, errors.GatedRepoError) for cause in causes):
        return (
            f"accept the licence at https://huggingface.co/{page}, then run `hf auth login` "
            "or set HF_TOKEN"
        )
    if is_hidden or any(isinstance(cause, errors.RepositoryNotFoundError) for cause in causes):
        return "check the spelling; for a private one run `hf auth login` or set HF_TOKEN"
    return None


def _fix(source: str, error: BaseException) -> str:
    if (fix := access_fix(source, error)) is not None:
        return fix
    if "trust_remote_code" in str(error):
        return (
            "the model brings its own code: read it, then set model.trust_remote_code=true, or "
            "choose a model that transformers knows"
        )
    return "give a folder with config.json and safetensors, or a hub id that is in the cache"


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
