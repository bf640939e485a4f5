"""No secret in what is shown or kept."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.storage.redact import _SECRETS, BLANK, redacted

AZURE = "https://acc.blob.core.windows.net/c/x.tar?sv=2022-11-02&se=2030-01-01&sr=c&sp=rl&sig={}&spr=https"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://user:pass@host/x.tar", "https://***@host/x.tar"),
        ("s3://user:p@ss@bucket/x", "s3://***@bucket/x"),
        ("https://user:p/ss@host/x", "https://***@host/x"),
        ("https://user:p?s#s@host/x", "https://***@host/x"),
        ("https://user:p@s/s@host/x?a=1", "https://***@host/x?a=1"),
        ("https://token@host/x", "https://***@host/x"),
        (AZURE.format("ab%2Fcd%3D"), AZURE.format("***")),
        ("https://h/x?jwt=abc.def.ghi&a=1", "https://h/x?jwt=***&a=1"),
        ("https://h/x?pwd=1&user=me", "https://h/x?pwd=***&user=me"),
        ("https://h/x?access_token=1#id_token=2", "https://h/x?access_token=***#id_token=***"),
        (
            "https://h/x?AWSAccessKeyId=A&Signature=B&Expires=1",
            "https://h/x?AWSAccessKeyId=***&Signature=***&Expires=1",
        ),
        ("x?X-Amz-Credential=A%2Fb&X-Amz-Security-Token=C", "x?X-Amz-Credential=***&X-Amz-Security-Token=***"),
        ("X-Goog-Signature is ?X-Goog-Signature=ab", "X-Goog-Signature is ?X-Goog-Signature=***"),
        ("Authorization: Bearer abcdefgh12", "Authorization: Bearer ***"),
        ("Authorization: Basic dXNlcjpwYXNz", "Authorization: Basic ***"),
        # nothing secret
        ("http://host:8080/a@b/x.tar", "http://host:8080/a@b/x.tar"),
        ("http://[::1]:8080/a@b.tar", "http://[::1]:8080/a@b.tar"),
        ("s3://bucket/a@b:c/x-{000..9}.tar", "s3://bucket/a@b:c/x-{000..9}.tar"),
        ("https://host/x.tar?download=true&design=1", "https://host/x.tar?download=true&design=1"),
        ("select.keep_images=true and a basic configuration", "select.keep_images=true and a basic configuration"),
        ("/data/me@home/x.tar", "/data/me@home/x.tar"),
    ],
)
def test_secrets_are_blanked_and_the_rest_stays(text: str, expected: str) -> None:
    assert redacted(text) == expected
    assert redacted(expected) == expected


IN_VALUES = st.text("abcXYZ019-._~%+/@:=!$*,", min_size=8, max_size=24)
IN_PASSWORDS = st.text("abcXYZ-._~%+/@:=!$*,?#&", min_size=8, max_size=24)
PARAMETERS = (
    "sig", "signature", "Signature", "X-Amz-Signature", "X-Amz-Security-Token", "X-Goog-Signature", "token", "access_token", "jwt",
    "id_jwt", "pwd", "password", "user-pwd", "api_key", "apikey", "subscription-key", "client_secret", "AWSAccessKeyId", "auth",
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    IN_VALUES,
    st.sampled_from(PARAMETERS),
    st.sampled_from(["?{}={}", "?a=1&{}={}", "?{}={}&b=2", "#{}={}", "?a=1;{}={}"]),
)
def test_no_secret_of_a_parameter_is_left(secret: str, name: str, form: str) -> None:
    text = redacted(f"error: 'https://host/x.tar{form.format(name, secret)}': refused")
    assert secret not in text
    assert text.endswith("': refused")


@settings(max_examples=300, deadline=None)
@given(IN_PASSWORDS, st.sampled_from(["https", "s3", "abfs", "webdav+https"]))
def test_no_password_is_left(secret: str, scheme: str) -> None:
    text = redacted(f"[{scheme}://user:{secret}@host/folder/x.tar] failed")
    assert secret not in text
    assert "host/folder/x.tar] failed" in text


@pytest.mark.parametrize("variable", _SECRETS)
@pytest.mark.parametrize("secret", ["abcd/efgh+ijkl=", "plain-token-1234"])
def test_no_credential_of_the_environment_is_left(monkeypatch: pytest.MonkeyPatch, variable: str, secret: str) -> None:
    monkeypatch.setenv(variable, secret)
    encoded = secret.replace("/", "%2F").replace("+", "%2B").replace("=", "%3D")
    text = redacted(f"{secret} in {encoded} of https://host/{secret}/x")
    assert secret not in text
    assert encoded not in text
    assert redacted("nothing of it") == "nothing of it"


def test_a_short_placeholder_blanks_no_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    assert redacted("a test of text") == "a test of text"


def test_the_token_of_an_origin_is_blanked_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOISY_STUDENT_TOKEN", "https://a.example=first-token,https://b.example:8443=second-token")
    assert redacted("401 for first-token, then for second-token") == f"401 for {BLANK}, then for {BLANK}"
