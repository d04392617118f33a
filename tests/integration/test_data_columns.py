"""Files of columns: Parquet and Arrow. Importing their reader takes seconds."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from launcher.errors import DataError
from launcher.worker.data_files import read_records

pytestmark = pytest.mark.integration


def write_columns(path: Path, rows: list[dict[str, object]]) -> Path:
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        open_writer = pa.ipc.new_file if path.stem == "file" else pa.ipc.new_stream
        with path.open("wb") as stream, open_writer(stream, table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize("name", ["train.parquet", "stream.arrow", "file.arrow"])
def test_columns_give_rows_without_the_nulls_that_their_types_put_into_turns(
    tmp_path: Path, name: str
) -> None:
    call = {"name": "f"}
    rows = [
        {"messages": [{"role": "user", "content": "a"}], "id": 1},
        {"messages": [{"role": "assistant", "content": None, "call": call}], "id": None},
    ]
    path = write_columns(tmp_path / name, rows)
    assert list(read_records(path)) == [
        (f"{name} row 1", {"messages": [{"role": "user", "content": "a"}], "id": 1}),
        (f"{name} row 2", {"messages": [{"role": "assistant", "call": call}], "id": None}),
    ]


@pytest.mark.parametrize("name", ["train.parquet", "train.arrow"])
def test_a_damaged_file_of_columns_is_named(tmp_path: Path, name: str) -> None:
    path = write_columns(tmp_path / name, [{"text": "a" * 500}])
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="or damaged") as caught:
        list(read_records(path))
    assert caught.value.where == str(path)


@pytest.mark.parametrize("name", ["train.parquet", "train.arrow"])
def test_a_file_of_columns_without_rows_is_empty(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.touch()
    with pytest.raises(DataError, match=r"the file is empty|or damaged"):
        list(read_records(path))
