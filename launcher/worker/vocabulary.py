"""Do the data's tokens have rows in the model's embedding?"""

from __future__ import annotations

from typing import Any

from launcher.errors import ModelError


def check_vocabulary(rows: Any, model: Any, *, source: str) -> None:
    """Raise ModelError when a token of the data lies beyond the model's embedding.

    torch would read past the table: an assertion on a GPU, from which no message comes.

    Args:
        rows: a dataset with the column ``input_ids``.
        model: the model, partitioned or not.
        source: its name, for the error.
    """
    num_embeddings: int = model.get_input_embeddings().num_embeddings
    highest = highest_token(rows)
    if highest >= num_embeddings:
        raise ModelError(
            f"the data has token {highest}, the model's embedding has {num_embeddings} rows "
            f"(0 to {num_embeddings - 1}): the tokenizer and the weights do not belong together",
            where=source,
            fix="use the tokenizer that came with the weights; where tokens were added, give the "
            "model rows for them first: model.resize_token_embeddings(len(tokenizer)), then save "
            "both into one folder",
        )


def highest_token(rows: Any) -> int:
    """Return the largest token id of a dataset; 0 when it holds none."""
    import pyarrow.compute

    chunks = rows.data.column("input_ids").chunks
    found = [pyarrow.compute.max(chunk.flatten()).as_py() for chunk in chunks if len(chunk)]
    return max((int(value) for value in found if value is not None), default=0)
