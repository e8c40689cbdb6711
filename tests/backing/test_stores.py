"""What of the environment decides how a store is reached."""

from __future__ import annotations

import pytest

from qedfs.backing.object_name import ObjectLocation
from qedfs.backing.stores import settings_for
from qedfs.errors import BackingRefused

S3, GS, AZ = (ObjectLocation(scheme, "bucket", "key") for scheme in ("s3", "gs", "az"))
ACCOUNT = {"AZURE_STORAGE_ACCOUNT_NAME": "account"}


@pytest.mark.parametrize(
    ("location", "environment", "variable"),
    [
        (S3, {"AWS_ENDPOINT_URL": "http://store"}, "AWS_ALLOW_HTTP"),
        (S3, {"AWS_ENDPOINT_URL": "https://store", "AWS_ENDPOINT_URL_S3": "http://store"}, "AWS_ALLOW_HTTP"),
        (GS, {"GOOGLE_BASE_URL": "http://store"}, "GOOGLE_ALLOW_HTTP"),
        (AZ, {"AZURE_STORAGE_ENDPOINT": "http://store", **ACCOUNT}, "AZURE_ALLOW_HTTP"),
    ],
)
def test_plain_http_needs_to_be_allowed(location: ObjectLocation, environment: dict[str, str], variable: str) -> None:
    with pytest.raises(BackingRefused, match=f"its endpoint is plain http; {variable}=true allows that"):
        settings_for(location, environment, signed=True)
    with pytest.raises(BackingRefused):
        settings_for(location, {**environment, variable: "false"}, signed=True)
    assert settings_for(location, {**environment, variable: "true"}, signed=True).client["allow_http"] is True


@pytest.mark.parametrize("location", [S3, GS, AZ])
def test_https_is_all_that_is_spoken_otherwise(location: ObjectLocation) -> None:
    assert settings_for(location, ACCOUNT, signed=True).client["allow_http"] is False


@pytest.mark.parametrize("location", [S3, GS, AZ])
def test_an_image_without_trust_signs_nothing(location: ObjectLocation) -> None:
    assert settings_for(location, ACCOUNT, signed=True).store == {}
    assert settings_for(location, ACCOUNT, signed=False).store == {"skip_signature": True}


def test_an_emulator_of_google_knows_nobody() -> None:
    for host in ("127.0.0.1:4443", "http://127.0.0.1:4443"):
        settings = settings_for(GS, {"STORAGE_EMULATOR_HOST": host}, signed=True)
        assert settings.store == {"base_url": "http://127.0.0.1:4443", "skip_signature": True}
        assert settings.client["allow_http"] is True


def test_azure_needs_an_account() -> None:
    with pytest.raises(BackingRefused, match="az://bucket/key: the environment names no account"):
        settings_for(AZ, {}, signed=True)
    assert settings_for(AZ, {"AZURE_STORAGE_USE_EMULATOR": "true"}, signed=True).client["allow_http"] is True


def test_authorities_are_those_of_aws_before_those_of_the_system() -> None:
    both = {"AWS_CA_BUNDLE": "/aws.pem", "SSL_CERT_FILE": "/system.pem"}
    assert settings_for(S3, both, signed=True).authority == "/aws.pem"
    assert settings_for(GS, both, signed=True).authority == "/system.pem"
    assert settings_for(S3, {}, signed=True).authority is None
