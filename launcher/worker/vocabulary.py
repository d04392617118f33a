"""Do the data's tokens have rows in the model's embedding?"""

from __future__ import annotations

import json
from pathlib import Path

from launcher.errors import ModelError
from launcher.recipe_sections import Recipe


def check_vocabulary(max_token_id: int, num_embeddings: int, *, source: str) -> None:
    """Raise ModelError when a token of the data lies beyond the model's embedding.

    torch would read past the table: an assertion on a GPU, from which no message comes.

    Args:
        max_token_id: the largest of the data's tokens, padding included.
        num_embeddings: rows of the model's embedding.
        source: the model's name, for the error.
    """
    if max_token_id >= num_embeddings:
        raise ModelError(
            f"the data has token {max_token_id}, the model's embedding has {num_embeddings} rows "
            f"(0 to {num_embeddings - 1}): the tokenizer and the weights do not belong together",
            where=source,
            fix="use the tokenizer that came with the weights; where tokens were added, give the "
            "model rows for them first: model.resize_token_embeddings(len(tokenizer)), then save "
            "both into one folder",
        )


def configured_rows(recipe: Recipe, config_path: Path | None) -> int | None:
    """Return the rows of the embedding that a model's configuration announces, before the job.

    Args:
        recipe: names the model.
        config_path: the model's config.json, where the model's own source has none.

    Returns:
        ``None`` where no configuration can be read: the ranks find out, who load the model.
    """
    from transformers import PretrainedConfig

    if config_path is not None and config_path.is_file():
        config = json.loads(config_path.read_text(encoding="utf-8"))
    else:
        name = recipe.model.name_or_path
        try:
            config, _ = PretrainedConfig.get_config_dict(name, revision=recipe.model.revision)
        except OSError:
            return None
    rows = (config.get("text_config") or config).get("vocab_size")
    return None if rows is None else int(rows)
