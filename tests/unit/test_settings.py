"""Where each setting comes from, which wins, and what is said of a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from grpc_server.domain.types import HandoverMode
from grpc_server.settings import Settings, explain, is_loopback, ollama_urls, split_address
from grpc_server.settings_sources import origins


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting from the outside."""
    import os

    for name in [name for name in os.environ if name.startswith("AGENTLOOP_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_the_defaults_are_on_this_machine_only(tmp_path: Path) -> None:
    settings = Settings()
    assert settings.grpc_address == "127.0.0.1:50051"
    assert settings.http_address == "127.0.0.1:8080"
    assert settings.state_dir == tmp_path / "var"
    assert settings.base_gguf == tmp_path / "var/models/gemma-3-270m-q4_k_m.gguf"
    assert settings.spool_dir == tmp_path / "var/spool"
    assert settings.spool_max_bytes == 1024**3
    assert set(origins(settings).values()) == {"default"}


def test_paths_follow_the_state_folder_unless_they_are_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "a b & ç"
    monkeypatch.setenv("AGENTLOOP_STATE_DIR", str(place))
    monkeypatch.setenv("AGENTLOOP_SPOOL_DIR", "elsewhere")
    settings = Settings()
    assert settings.base_gguf == place / "models/gemma-3-270m-q4_k_m.gguf"
    assert settings.spool_dir == tmp_path / "elsewhere"


def test_environment_beats_dotenv_beats_yaml_beats_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "settings.yaml").write_text("parallel: 2\nthreads: 2\nqueue_size: 2\n")
    (tmp_path / ".env").write_text("AGENTLOOP_PARALLEL=3\nAGENTLOOP_THREADS=3\nAGENTLOOP_TOKEN=al_x\n")
    monkeypatch.setenv("AGENTLOOP_CONFIG", "settings.yaml")
    monkeypatch.setenv("AGENTLOOP_PARALLEL", "5")
    settings = Settings()
    assert (settings.parallel, settings.threads, settings.queue_size) == (5, 3, 2)
    found = origins(settings)
    assert (found["parallel"], found["threads"], found["queue_size"], found["engine"]) == (
        "environment",
        ".env",
        "yaml",
        "default",
    )


def test_a_secret_may_be_a_file_and_is_never_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dsn").write_text("postgresql://u:hush@db/agentloop\n")
    monkeypatch.setenv("AGENTLOOP_DATABASE_URL_FILE", "dsn")
    settings = Settings()
    assert settings.database_url.get_secret_value() == "postgresql://u:hush@db/agentloop"
    assert origins(settings)["database_url"] == "file"
    assert "hush" not in repr(settings)
    monkeypatch.setenv("AGENTLOOP_DATABASE_URL", "postgresql:///other")
    with pytest.raises(ValueError, match="both AGENTLOOP_DATABASE_URL and AGENTLOOP_DATABASE_URL_FILE"):
        Settings()


def test_only_secrets_may_be_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "number").write_text("9")
    monkeypatch.setenv("AGENTLOOP_PARALLEL_FILE", "number")
    assert Settings().parallel == 4


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("paralel: 3\n", "sets paralel, which is no setting"),
        ("- 1\n", "is not a list of settings"),
        ("a: [\n", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_yaml_file_that_is_wrong_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, text: str
) -> None:
    if content is not None:
        (tmp_path / "settings.yaml").write_text(content)
    monkeypatch.setenv("AGENTLOOP_CONFIG", "settings.yaml")
    with pytest.raises(ValueError, match=text):
        Settings()


def test_an_empty_yaml_file_sets_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "settings.yaml").write_text("# nothing yet\n")
    monkeypatch.setenv("AGENTLOOP_CONFIG", "settings.yaml")
    assert Settings().parallel == 4


def test_a_secret_file_that_is_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTLOOP_DATABASE_URL_FILE", "nowhere")
    with pytest.raises(ValueError, match="AGENTLOOP_DATABASE_URL_FILE names nowhere"):
        Settings()


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        ("PARALLEL", "0", "AGENTLOOP_PARALLEL is '0': Input should be greater than or equal to 1"),
        ("GRPC_ADDRESS", "50051", "AGENTLOOP_GRPC_ADDRESS is '50051': '50051' is not an address"),
        ("HTTP_ADDRESS", "a:99999", "is not an address"),
        ("ENGINE", "vllm", "AGENTLOOP_ENGINE is 'vllm': Input should be 'embedded' or 'ollama'"),
        ("SPOOL_MAX_BYTES", "1KB", "AGENTLOOP_SPOOL_MAX_BYTES"),
        ("SERVER_ID", "a\nb", "is not a server id"),
        ("MODEL_NAME", "a:b", "AGENTLOOP_MODEL_NAME"),
        ("LOG_LEVEL", "loud", "AGENTLOOP_LOG_LEVEL"),
        (
            "JWKS",
            "http://keys.test/set",
            "is no place of keys; write a path, an https URL, or an http URL of",
        ),
        ("JWKS", "ftp://127.0.0.1/set", "is no place of keys"),
        ("JWKS", "https:///set", "is no place of keys"),
        ("JWKS", "keys.json", "AGENTLOOP_JWKS needs AGENTLOOP_JWT_ISSUER and AGENTLOOP_JWT_AUDIENCE too"),
        ("JWT_ALIASES", "default,Agent", "alias is 'Agent'; it must be 1 to 64 of a-z"),
        ("JWT_ALIASES", ",", "alias is ''; it must be 1 to 64 of a-z"),
        ("TLS_CERT_FILE", "a.crt", "AGENTLOOP_TLS_CERT_FILE and AGENTLOOP_TLS_KEY_FILE need each other"),
        ("TLS_KEY_FILE", "a.key", "AGENTLOOP_TLS_CERT_FILE and AGENTLOOP_TLS_KEY_FILE need each other"),
        ("TLS_CLIENT_CA_FILE", "ca.pem", "AGENTLOOP_TLS_CLIENT_CA_FILE needs AGENTLOOP_TLS_CERT_FILE"),
        ("CACHE_SECONDS", "2.1", "AGENTLOOP_CACHE_SECONDS is '2.1': Input should be less than or equal to 2"),
    ],
)
def test_a_wrong_value_is_named_with_its_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, text: str
) -> None:
    monkeypatch.setenv(f"AGENTLOOP_{variable}", value)
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert text in explain(caught.value)


@pytest.mark.parametrize(
    "place", ["keys.json", "https://keys.test/set", "http://localhost:8000/set", "http://[::1]/set"]
)
def test_keys_of_jwts_are_a_file_or_a_safe_url(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    for name, value in (
        ("JWKS", place),
        ("JWT_ISSUER", "https://issuer.test"),
        ("JWT_AUDIENCE", "agent-loop"),
    ):
        monkeypatch.setenv(f"AGENTLOOP_{name}", value)
    assert Settings().jwks == place


def test_sizes_and_levels_are_read_as_people_write_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTLOOP_SPOOL_MAX_BYTES", "20MiB")
    monkeypatch.setenv("AGENTLOOP_LOG_LEVEL", "debug")
    settings = Settings()
    assert (settings.spool_max_bytes, settings.log_level) == (20 * 1024**2, "DEBUG")


@pytest.mark.parametrize(
    ("address", "parts", "loopback"),
    [
        ("127.0.0.1:0", ("127.0.0.1", 0), True),
        ("127.9.9.9:1", ("127.9.9.9", 1), True),
        ("[::1]:50051", ("::1", 50051), True),
        ("localhost:1", ("localhost", 1), True),
        ("0.0.0.0:1", ("0.0.0.0", 1), False),
        ("[::]:1", ("::", 1), False),
        ("10.0.0.1:1", ("10.0.0.1", 1), False),
        ("example.org:1", ("example.org", 1), False),
    ],
)
def test_addresses_are_split_and_known_to_be_local_or_not(
    address: str, parts: tuple[str, int], loopback: bool
) -> None:
    assert split_address(address) == parts
    assert is_loopback(address) is loopback


@pytest.mark.parametrize("address", ["", ":1", "a", "a:", "a:b", "a:-1", "a:٣", "a:65536"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="is not an address"):
        split_address(address)


def test_several_ollamas_are_named_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTLOOP_OLLAMA_URL", "http://a:11434, b:11434,[::1]:11434")
    assert ollama_urls(Settings().ollama_url) == ["http://a:11434", "b:11434", "[::1]:11434"]


@pytest.mark.parametrize(
    ("value", "problem"),
    [("http://a/b c", "no address"), ("a:1,a:1", "named twice"), ("ftp://a", "no address")],
)
def test_an_ollama_that_is_none_is_refused_in_words(
    monkeypatch: pytest.MonkeyPatch, value: str, problem: str
) -> None:
    monkeypatch.setenv("AGENTLOOP_OLLAMA_URL", value)
    with pytest.raises(ValidationError, match=problem):
        Settings()


def test_no_gpu_is_lent_where_it_is_not_clear_which() -> None:
    hosts = "http://a:11434,http://b:11434"
    with pytest.raises(ValueError, match="which of their GPUs would be lent"):
        Settings(gpu_handover=HandoverMode.DRAIN, ollama_url=hosts)
    assert Settings(ollama_url=hosts).gpu_handover is HandoverMode.OFF
