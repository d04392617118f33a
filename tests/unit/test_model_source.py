"""Where a model's config comes from, and what is said when it does not."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from launcher.errors import ModelError
from launcher.model_source import (
    catalogue_names,
    load_catalogue_entry,
    resolve_model,
    weights_source,
)

TINY = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty hub cache and no network, as huggingface_hub understands them."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def test_catalogue_holds_the_promised_models() -> None:
    assert len(catalogue_names()) == 49
    assert {"llama2-7b", "llama3.1-405b", "falcon-180b", "phi-4-mini"} <= set(catalogue_names())


@pytest.mark.parametrize(
    "name", ["llama2-7b", "LLAMA2-7B", "meta-llama/Llama-2-7b-hf", "meta-llama/llama-2-7b-chat-hf"]
)
def test_case_and_hub_ids_lead_to_the_same_entry(name: str) -> None:
    assert load_catalogue_entry(name).name == "llama2-7b"


def test_every_entry_names_its_sources_and_its_own_file() -> None:
    for name in catalogue_names():
        entry = load_catalogue_entry(name)
        assert entry.name == name
        assert entry.source.startswith(f"https://huggingface.co/{entry.hub_id}/")
        assert entry.published_source


def test_unknown_short_name_suggests_the_nearest() -> None:
    with pytest.raises(ModelError, match="did you mean 'llama2-7b'"):
        resolve_model("lama2-7b")


def test_folder_with_a_config_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    spec, config = resolve_model(str(tmp_path))
    assert config == TINY
    assert (spec.name, spec.hidden_size) == (str(tmp_path), 64)


def test_folder_wins_over_a_catalogue_model_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "phi-2").mkdir()
    (tmp_path / "phi-2" / "config.json").write_text(json.dumps(TINY))
    monkeypatch.chdir(tmp_path)
    assert resolve_model("phi-2")[0].model_type == "llama"
    assert weights_source("phi-2") == "phi-2"


def test_folder_without_config_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_model(str(tmp_path))


def test_adapter_folder_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="name the base model"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("{", "cannot read it as JSON"), ("[1]", "a list, not a mapping"), ("\xff", "cannot read")],
)
def test_broken_config_names_the_file(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=complaint) as caught:
        resolve_model(str(tmp_path))
    assert caught.value.where == str(tmp_path / "config.json")


def test_missing_folder_is_not_taken_for_a_hub_id() -> None:
    with pytest.raises(ModelError, match="there is no folder"):
        resolve_model("./no-such-folder")


@pytest.mark.usefixtures("offline")
def test_unreachable_hub_says_what_to_do() -> None:
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE") as caught:
        resolve_model("owner/name")
    assert caught.value.where == "hub model owner/name"


@pytest.mark.usefixtures("offline")
def test_revision_of_a_catalogue_model_is_asked_of_the_hub() -> None:
    with pytest.raises(ModelError) as caught:
        resolve_model("phi-2", revision="main")
    assert caught.value.where == "hub model microsoft/phi-2 at revision main"


def test_impossible_hub_id_is_refused() -> None:
    with pytest.raises(ModelError, match="the hub refused"):
        resolve_model("owner/na me")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, tuple[int, str]]]:
    """A hub on this machine that answers each repository with a status and an error code."""
    answers: dict[str, tuple[int, str]] = {}

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            repository = "/".join(self.path.split("/")[1:3])
            status, code = answers[repository]
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", '"1"')
            self.send_header("Content-Length", str(len(json.dumps(TINY))))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(json.dumps(TINY).encode())

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        from huggingface_hub import constants

        endpoint = f"http://127.0.0.1:{server.server_port}"
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield answers
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "code", "advice"),
    [
        (403, "GatedRepo", "hf auth login"),
        (404, "RepoNotFound", "check the spelling"),
        (404, "RevisionNotFound", "give a branch"),
        (404, "EntryNotFound", "has no config"),
        (400, "", r"was not reached \(Bad request"),
    ],
)
def test_hub_refusals_say_what_to_do(
    hub: dict[str, tuple[int, str]], status: int, code: str, advice: str
) -> None:
    hub["owner/name"] = (status, code)
    with pytest.raises(ModelError, match=advice):
        resolve_model("owner/name")


def test_config_is_fetched_from_the_hub(hub: dict[str, tuple[int, str]]) -> None:
    hub["owner/name"] = (200, "")
    spec, config = resolve_model("owner/name")
    assert (spec.name, spec.hidden_size, config) == ("owner/name", 64, TINY)


def test_revision_of_a_catalogue_model_keeps_its_short_name(
    hub: dict[str, tuple[int, str]],
) -> None:
    hub["microsoft/phi-2"] = (200, "")
    assert resolve_model("phi-2", revision="main")[0].name == "phi-2"


def test_weights_come_from_the_hub_id_of_a_catalogue_model() -> None:
    assert weights_source("llama2-7b") == "meta-llama/Llama-2-7b-hf"
    assert weights_source("owner/name") == "owner/name"
