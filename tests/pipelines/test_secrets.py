"""Secrets in URLs: which are found, and that no text shows them."""

import pickle

import pytest
from pydantic import ValidationError

from pipelines.errors import MisuseError, UserError
from pipelines.secrets import find_secret, holds_secret, without_secrets
from pipelines.tracking.config import TrackingConfig

SECRET = "never-to-be-seen"
WITH_SECRET = [
    f"postgresql://mlflow:{SECRET}@db/mlflow",
    f"postgresql://mlflow:{SECRET}@wrong@db:5432/mlflow",
    f"https://user:{SECRET}@mlflow.example/",
    f"http://{SECRET}@mlflow.example:5000",
    f"s3://KEY:{SECRET}/with/slashes@bucket/x",
    f"simplecache::s3://KEY:{SECRET}@bucket/x",
    f"https://a.example/x?version=1&X-Amz-Signature={SECRET}&X-Amz-Date=1",
    f"https://a.example/x?X-Amz-Security-Token={SECRET}",
    f"az://box/x?sv=2024&sig={SECRET}",
    f"https://a.example/x?password={SECRET}",
    f"https://a.example/x?access_token={SECRET}",
    f"https://a.example/x#api-key={SECRET}",
    f"DefaultEndpointsProtocol=https;AccountName=a;AccountKey={SECRET};EndpointSuffix=b",
]
WITHOUT_SECRET = [
    "runs/demo",
    "s3://bucket/a:b@c",
    "s3://bucket/key=1/token=2/{000..010}.tar",
    "http://127.0.0.1:5000/a@b",
    "http://[2001:db8::1]:80/a@b",
    "postgresql://mlflow@db:5432/mlflow",
    "abfs://container@account.dfs.core.windows.net/x",
    "sqlite:////srv/mlflow.db?timeout=30",
    "a large red circle: on the left @ the top",
    r"(?i)[?&]token=\w+",
]


@pytest.mark.parametrize("url", WITH_SECRET)
def test_a_url_with_a_secret_is_found_and_the_secret_taken_out_of_text(url: str) -> None:
    assert holds_secret(url)
    assert find_secret({"a": [{"b": "fine"}, {"c": url}]}) == ["a", "1", "c"]
    for text in (url, f"cannot reach '{url}': refused", f"<{url}> and then a@b", f'{{"uri": "{url}"}}'):
        shown = without_secrets(text)
        assert SECRET not in shown
        assert "***" in shown


@pytest.mark.parametrize("url", WITHOUT_SECRET)
def test_what_only_looks_like_a_secret_is_left_alone(url: str) -> None:
    assert not holds_secret(url)
    assert without_secrets(f"cannot reach '{url}': refused by a@b") == f"cannot reach '{url}': refused by a@b"


def test_a_password_with_spaces_is_found() -> None:
    assert holds_secret(f"postgresql://mlflow:{SECRET} {SECRET}@db/mlflow")


def test_what_surrounds_a_secret_stays() -> None:
    text = f"GET https://a.example/x?v=1&sig={SECRET}&w=2 and http://user:{SECRET}@b.example:80/y failed"
    shown = "GET https://a.example/x?v=1&sig=***&w=2 and http://user:***@b.example:80/y failed"
    assert without_secrets(text) == shown


def test_secrets_of_the_environment_are_taken_out_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "opensesame")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://mlflow:not%2Fto be seen@db/mlflow")
    shown = without_secrets("tried opensesame, not/to be seen, and postgresql://mlflow:not%2Fto be seen@db/mlflow")
    assert shown == "tried ***, ***, and postgresql://mlflow:***@db/mlflow"


def test_errors_for_people_hide_secrets_on_the_way_between_processes_too() -> None:
    for error in (UserError(f"no answer from {WITH_SECRET[0]}"), MisuseError(f"no answer from {WITH_SECRET[0]}")):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error) == "no answer from postgresql://mlflow:***@db/mlflow"


def test_a_config_built_in_python_refuses_a_secret_without_repeating_it() -> None:
    with pytest.raises(ValidationError, match="must not hold a password, token or signature") as caught:
        TrackingConfig(uri=WITH_SECRET[0])
    assert SECRET not in str(caught.value)
