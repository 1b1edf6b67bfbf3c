import pytest
from pydantic import ValidationError

from resnet_ensemble.server.settings import SHIPPED_BUNDLE, Settings, SettingsError, explain, from_environment


def test_the_defaults_serve_the_shipped_bundle_on_this_machine_only() -> None:
    settings = Settings()

    assert settings.bundle == SHIPPED_BUNDLE
    assert (SHIPPED_BUNDLE / "bundle.json").is_file()
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)


def test_variables_with_the_prefix_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESNET_PORT", "9001")
    monkeypatch.setenv("RESNET_MAX_WAIT_SECONDS", "2.5")

    settings = from_environment()

    assert (settings.port, settings.max_wait_seconds) == (9001, 2.5)


def test_an_unknown_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESNET_PROT", "9001")

    with pytest.raises(SettingsError, match=r"RESNET_PROT is not a setting; there are .*RESNET_PORT"):
        from_environment()


def test_the_variables_of_the_sdk_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESNET_CLIENT_URL", "http://localhost:8000")

    from_environment()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "70000"),
        ("port", "http"),
        ("streams", "0"),
        ("streams", "1000000"),
        ("admin_key", "short"),
        ("max_wait_seconds", "0"),
        ("max_wait_seconds", "inf"),
        ("engine_timeout_seconds", "inf"),
        ("upload_seconds", "nan"),
        ("backend", "cuda"),
        ("stop", "early"),
        ("protocol", "11crop"),
    ],
)
def test_a_wrong_value_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"RESNET_{name.upper()}", value)

    with pytest.raises(SettingsError, match=f"^RESNET_{name.upper()}: [A-Z]"):
        from_environment()


def test_every_wrong_value_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESNET_PORT", "http")
    monkeypatch.setenv("RESNET_STREAMS", "0")

    with pytest.raises(SettingsError, match=r"RESNET_PORT: .*; RESNET_STREAMS: "):
        from_environment()


@pytest.mark.parametrize("name", ["host", "bundle", "reload_from", "admin_key", "port"])
def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"RESNET_{name.upper()}", "")

    assert from_environment() == Settings()


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"max_image_bytes": 2, "max_request_bytes": 1}, "RESNET_MAX_IMAGE_BYTES.*RESNET_MAX_REQUEST_BYTES"),
        ({"max_pending_bytes": 10 * 2**20}, "RESNET_MAX_REQUEST_BYTES.*RESNET_MAX_PENDING_BYTES"),
        (
            {"max_images_per_request": 2, "max_images_per_client": 1},
            "RESNET_MAX_IMAGES_PER_REQUEST.*RESNET_MAX_IMAGES_PER_CLIENT",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, int], names: str) -> None:
    with pytest.raises(ValidationError, match=names):
        Settings(**settings)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().port = 1


def test_every_setting_is_explained_with_its_default() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []
    assert "RESNET_PORT" in explain()
    assert "The TCP port to listen on. [8000]" in explain()
    assert len(explain().splitlines()) == len(Settings.model_fields)


@pytest.mark.parametrize("variables", [{"ADMIN_KEY": "a-secret"}, {"ADMIN_KEY": "long-enough-a-secret"}])
def test_a_wrong_setting_tells_nothing_of_the_key(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in {**variables, "MAX_PENDING_BYTES": "1"}.items():
        monkeypatch.setenv(f"RESNET_{name}", value)

    with pytest.raises(SettingsError, match="RESNET_") as caught:
        from_environment()
    assert "secret" not in str(caught.value)


def test_what_kubernetes_sets_because_of_a_service_s_name_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of services named `resnet` and `resnet-ensemble`: into every pod of the namespace, unless that is turned off."""
    for name in ("RESNET", "RESNET_ENSEMBLE"):
        for variable, value in {
            "SERVICE_HOST": "10.0.0.1",
            "SERVICE_PORT": "8000",
            "SERVICE_PORT_HTTP": "8000",
            "PORT": "tcp://10.0.0.1:8000",
            "PORT_8000_TCP": "tcp://10.0.0.1:8000",
            "PORT_8000_TCP_PROTO": "tcp",
            "PORT_8000_TCP_PORT": "8000",
            "PORT_8000_TCP_ADDR": "10.0.0.1",
        }.items():
            monkeypatch.setenv(f"{name}_{variable}", value)

    assert from_environment() == Settings(port=8000)
    monkeypatch.setenv("RESNET_PORTT", "9000")
    with pytest.raises(SettingsError, match="RESNET_PORTT is not a setting"):
        from_environment()


@pytest.mark.parametrize("key", ["a-long-enough-secret\n", " a-long-enough-secret", " " * 20, "ein-schlüssel-für-alle"])
def test_an_admin_key_that_no_header_can_carry_is_refused(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("RESNET_ADMIN_KEY", key)

    with pytest.raises(SettingsError, match="RESNET_ADMIN_KEY: it has characters that no header") as caught:
        from_environment()
    assert key not in str(caught.value)
