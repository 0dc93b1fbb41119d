"""Secrets are removed from URLs and other texts, and stored URLs are completed again."""

from __future__ import annotations

import json
import re
import shlex
import string
from urllib.parse import quote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qtorch.core import secrets
from qtorch.core.errors import ConfigError
from qtorch.core.secrets import (
    URLS_VARIABLE,
    check_complete,
    complete_tree,
    complete_url,
    is_secret_name,
    redact_error,
    redact_secrets,
    redact_tree,
    redact_urls,
    url_variables,
)
from qtorch.core.session import set_defaults
from qtorch.core.trust import StoredText, as_stored_text

# A URL with its secret between « and », and the URL without it ("same": only the secret is masked).
URLS = [
    "postgresql://me:«s3cret»@host/db",
    "postgresql+psycopg://me:«s3cret»@host:5432/db?sslmode=require",
    "postgresql://me:«s/cr/t»@host/db",
    "postgresql://me:«s@cr@t»@host/db",
    "postgresql://me:«s%40cr%2Ft»@host/db",
    "postgresql://me:«s#cret»@host/db",
    "postgresql://me:«s?cret»@host/db",
    "postgresql://me:«s:cret»@host/db",
    "postgresql://me:«12/34»@host/db",
    "postgresql://me:«12»@host/db",
    "postgresql://me:«/@#:%?»@host/db",
    "postgresql://me:«x://y»@host/db",
    "postgresql://me:«s'c\"r»@host/db",
    "postgresql://me@tenant:«s3cret»@host/db",
    "postgresql://me@tenant:«s/3»@host/db",
    "postgresql://:«s3cret»@host/db",
    "postgresql://host/db?user=me&password=«s3cret»",
    "postgresql://host:5432/db?password=«s@cret»&sslmode=require",
    "postgresql://me:«pw1»@host/db?sslpassword=«pw2»&application_name=x",
    "postgresql://me:«s3cret»@[::1]:5432/db",
    "mysql://me:«s3cret»@127.0.0.1/db",
    "mssql+pyodbc:///?odbc_connect=«DRIVER%3DX%3BPWD%3Ds»",
    "mongodb://me:«s3cret»@host1:27017,host2:27017,host3/db?authSource=admin&replicaSet=rs",
    "mongodb+srv://me:«s%2F3»@cluster.example.net/db",
    "mongodb://host/db?authMechanismProperties=«AWS_SESSION_TOKEN:abc»",
    "http://me:«s3cret»@host:5000",
    "https://me:«s3cret»@host:5000/api/2.0?x=1#part",
    "https://me:«s/cret»@host:5000",
    "https://«TOKEN123»@host/path",
    "https://:«TOKEN123»@host/path",
    "https://«TOKEN123»:@host/path",
    "https://«TOKEN123»:«x-oauth-basic»@host/path.git",
    "git+https://«TOKEN123»@host/path.git",
    "http://me:«s3cret»@[::1]:5000/x",
    "https://host/path?token=«abc»&page=2",
    "https://host/path?api_key=«abc»",
    "https://host/path?apikey=«abc»",
    "https://host/path?access_token=«abc»",
    "https://host/path?X-Amz-Credential=«AK%2Fx»&X-Amz-Signature=«abc»&X-Amz-Date=1",
    "https://host/path?sv=1&sig=«abc%3D»",
    "https://host/callback#access_token=«abc»&state=1",
    "redis://:«s3cret»@host:6379/0",
    "s3://KEY:«s3cret»@bucket/path",
    "jdbc:postgresql://host/db?user=me&password=«s3cret»",
]
# Text that must not change.
HARMLESS = [
    "",
    "no URL at all, a@b.example and user:name",
    "postgresql://me@host/db",
    "postgresql://host:5432/db",
    "postgresql://me@host:5432/db?options=-csearch_path%3Doptuna",
    "postgresql://h1:5432,h2:5433/db",
    "mongodb://h1:27017,h2:27017/db?authSource=admin&authMechanism=PLAIN",
    "sqlite:////folder/mlflow.db",
    "sqlite:///C:/folder/a@b:c.db",
    "file:///folder/a:b@c",
    "http://127.0.0.1:5000",
    "http://127.0.0.1:5000/#/experiments/1?searchFilter=a",
    "https://host:8080/users/me@example.com",
    "https://host/@scope/package",
    "http://[::1]:5000/x@y",
    "http://[fe80::1]/x",
    "ssh://git@host/repository.git",
    "abfss://container@account.dfs.core.windows.net/path",
    "databricks://profile",
    "databricks-uc",
    "dataset.step_len=20 model.optimizer.lr=0.01 model.network.num_tokens=5",
    "https://host/path?page=2&order=asc&tokens=3",
    "label=Ref($close,-2)/Ref($close,-1)-1",
    "postgresql://me:***@host/db?password=***",
]


def split_example(marked_url: str) -> tuple[str, str]:
    """Return the URL and its redacted form."""
    return marked_url.replace("«", "").replace("»", ""), re.sub("«[^»]*»", "***", marked_url)


@pytest.mark.parametrize("marked_url", URLS)
def test_secrets_of_urls(marked_url):
    url, redacted = split_example(marked_url)
    assert redact_urls(url) == redacted
    assert redact_urls(f"tracking.uri={url}") == f"tracking.uri={redacted}"
    assert redact_urls(redacted) == redacted
    if '"' in url or "'" in url:
        return  # in a longer text these are quotation marks
    texts = [
        f"could not connect to {url} (refused)",
        f"(psycopg.OperationalError) {url!r}, (Background on this error at: https://sqlalche.me/e/20/e3q8)",
        json.dumps({"tracking": {"uri": url}, "mail": "a@b.example"}),
        shlex.join(["qtorch", "train", f"tracking.uri='{url}'", "-m", "seed=1,2"]),
        f'<a href="{url}">{url}</a>',
        f"HTTPConnectionPool(host='h', port=1): Max retries exceeded with url: {url} (Caused by x)",
        f"{url}\n{url}",
    ]
    for text in texts:
        assert redact_urls(text) == text.replace(url, redacted)


def test_several_urls_in_one_word():
    text = "urls=[http://a:pw1@h1/x,postgresql://b:pw2@h2/y,https://tok3@h3,http://h4/z]"
    expected = "urls=[http://a:***@h1/x,postgresql://b:***@h2/y,https://***@h3,http://h4/z]"
    assert redact_urls(text) == expected


@pytest.mark.parametrize("text", HARMLESS)
def test_text_without_a_secret_stays(text):
    assert redact_urls(text) == text
    assert redact_secrets(text) == text


PRINTABLE = string.ascii_letters + string.digits + string.punctuation
UNRESERVED_IN_PASSWORDS = "!$&()*+,;=:~-._"
WORDS = st.text(string.ascii_letters + string.digits, min_size=1, max_size=8)
PLAIN_TEXTS = st.text(string.ascii_letters + string.digits + " .,;!()[]-_\n", max_size=40)
FORMS = [
    "{scheme}://{user}:{secret}@{host}/{path}",
    "{scheme}://{user}:{secret}@{host}:5432/{path}?a=b&c=d",
    "{scheme}://:{secret}@{host}",
    "{scheme}://{user}:{secret}@[::1]:80/{path}",
    "{scheme}://{user}:{secret}@{host}:1,{host}:2/{path}",
    "https://{secret}@{host}/{path}",
    "https://{secret}:@{host}/{path}",
    "postgresql://{user}@{host}/{path}?password={secret}",
    "{scheme}://{host}/{path}?a=b&token={secret}&c=d",
    "{scheme}://{host}/{path}?api_key={secret}",
]
SCHEMES = ["http", "https", "postgresql", "postgresql+psycopg", "mongodb", "mongodb+srv", "mysql"]


@settings(max_examples=300, deadline=None)
@given(
    password=st.text(PRINTABLE, min_size=6, max_size=20),
    form=st.sampled_from(FORMS),
    scheme=st.sampled_from(SCHEMES),
    user=WORDS,
    host=WORDS,
    path=WORDS,
    before=PLAIN_TEXTS,
    after=PLAIN_TEXTS,
    is_quoted=st.booleans(),
)
@example("p@ss/w#r:d", FORMS[0], "postgresql", "me", "h", "db", "a ", " b", True)
def test_random_secrets_never_survive(
    password, form, scheme, user, host, path, before, after, is_quoted
):
    secret = "S3" + quote(password, safe="" if "={secret}" in form else UNRESERVED_IN_PASSWORDS)
    if form.startswith("https://{secret}"):
        secret = secret.replace(":", "%3A")
    url = form.format(scheme=scheme, user=user, secret=secret, host=host, path=path)
    redacted = form.format(scheme=scheme, user=user, secret="***", host=host, path=path)
    mark = '"' if is_quoted else " "
    text = f"{before}{mark}{url}{mark}{after}"
    assert redact_urls(text) == f"{before}{mark}{redacted}{mark}{after}"
    assert redact_secrets(text).count(secret) == 0


@settings(max_examples=200, deadline=None)
@given(
    password=st.text(string.ascii_letters + string.digits + "/@#:?%", min_size=1, max_size=15),
    scheme=st.sampled_from(["postgresql", "mongodb", "mysql+pymysql"]),
    user=WORDS,
)
def test_random_passwords_without_percent_encoding(password, scheme, user):
    url = f"{scheme}://{user}:S3{password}3S@host.example/db?a=b"
    assert redact_urls(f"x {url} y") == f"x {scheme}://{user}:***@host.example/db?a=b y"


@settings(max_examples=200, deadline=None)
@given(text=st.text(string.ascii_letters + string.digits + " .,;!?()[]-_/:\n", max_size=80))
def test_random_text_without_a_secret_stays(text):
    assert redact_urls(text) == text


def test_long_text_is_fast():
    secrets_text = "a" * 300_000 + "=" + "https" * 20_000 + "?" * 10_000 + "token" * 10_000
    assert redact_secrets(secrets_text)  # a quadratic pattern would take minutes


KEY = "-----BEGIN RSA PRIVATE KEY-----\n+MIIEpAIBAAKCAQEA\n+abc\n+-----END RSA PRIVATE KEY-----"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("id = AKIAABCDEFGHIJKLMNOP", "id = ***"),
        ("x ghp_abcdefghijklmnopqrstuvwxyz0123456789 y", "x *** y"),
        ("sk-abcdefghijklmnopqrstuvwx", "***"),
        ("xoxb-123456789-abcdef", "***"),
        (f"+{KEY}\n+next", "+***\n+next"),
        ('+    password = "hunter2"', '+    password = "***"'),
        ("-    db_password='hunter2',", "-    db_password='***',"),
        ('+{"api_key": "hunter2", "b": 1}', '+{"api_key": "***", "b": 1}'),
        ("+token: hunter2", "+token: ***"),
        ("+API_KEY=hunter2", "+API_KEY=***"),
        ("+export AWS_SECRET_ACCESS_KEY=hunter2+/x", "+export AWS_SECRET_ACCESS_KEY=***"),
        ("host=h user=me password=hunter2 dbname=x", "host=h user=me password=*** dbname=x"),
        ("+url = 'mysql://me:hunter2@h/db'", "+url = 'mysql://me:***@h/db'"),
        ("Authorization: Bearer abcdefgh12345", "Authorization: Bearer ***"),
        ('+password: str = "hunter2"', '+password: str = "***"'),
    ],
)
def test_secrets_of_other_texts(text, expected):
    assert redact_secrets(text) == expected


@pytest.mark.parametrize(
    "code",
    [
        "+def check(password: str, token: str | None = None) -> bool:",
        '+password = os.environ["PASSWORD"]',
        "+token = read_token(path)",
        "+num_tokens = 512",
        "+tokenizer = 'bert-base'",
        "+max_token: 128",
        "+if token is None or token == other:",
    ],
)
def test_code_around_secrets_stays(code):
    assert redact_secrets(code) == code


def test_names_of_secret_variables():
    names = ("QTORCH_PASSWORD", "QTORCH_API_KEY", "QTORCH_TOKEN", "QTORCH_CLIENT_SECRET")
    assert all(map(is_secret_name, names))
    assert not any(map(is_secret_name, ("QTORCH_CACHE", "QTORCH_NUM_TOKENS", "QTORCH_TASK_URL")))


FULL, STORED = "postgresql://me:s3cret@host:5432/db?a=b", "postgresql://me:***@host:5432/db?a=b"


def test_url_is_completed_from_what_this_process_has_used():
    assert complete_url(STORED) == STORED
    assert complete_url(FULL) == FULL
    assert complete_url(STORED) == FULL
    assert complete_tree({"a": [STORED, ("x", 1)]}) == {"a": [FULL, ("x", 1)]}
    assert redact_tree({"a": [FULL, ("x", 1)]}) == {"a": [STORED, ("x", 1)]}


@pytest.mark.parametrize(
    ("variable", "url"),
    [
        ("MLFLOW_TRACKING_URI", FULL),
        ("ANY_NAME", FULL),
        ("MLFLOW_TRACKING_URI", "postgresql+psycopg://other:pw@host:5432/db?a=b"),
        ("MLFLOW_TRACKING_URI", "postgresql://host:5432/db?a=b"),  # with a password file
        (URLS_VARIABLE, json.dumps(["mysql://x:y@z", FULL])),
    ],
)
def test_url_is_completed_from_the_environment(monkeypatch, variable, url):
    monkeypatch.setenv(variable, url)
    assert complete_url(STORED) == (FULL if variable == URLS_VARIABLE else url)


def test_url_is_completed_from_the_session():
    set_defaults(tracking_uri=FULL)
    assert complete_url(STORED) == FULL


@pytest.mark.parametrize(
    "other",
    ["postgresql://me:s3cret@elsewhere:5432/db?a=b", "postgresql://me:s3cret@host:5433/db?a=b",
     "postgresql://me:s3cret@host:5432/other?a=b", "mysql://me:s3cret@host:5432/db?a=b"],
)  # fmt: skip
def test_password_of_another_address_is_not_used(monkeypatch, other):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", other)
    assert complete_url(STORED) == STORED
    with pytest.raises(ConfigError, match=r"me:\*\*\*@host.* set MLFLOW_TRACKING_URI to"):
        check_complete(STORED, "MLFLOW_TRACKING_URI")


def test_child_processes_get_the_complete_urls(monkeypatch):
    assert url_variables() == {}
    complete_url(FULL)
    variables = url_variables()
    secrets._urls.clear()
    monkeypatch.setenv(URLS_VARIABLE, variables[URLS_VARIABLE])
    assert complete_url(STORED) == FULL
    assert url_variables() == variables  # for children of the child


def test_messages_of_an_exception_and_its_causes():
    with pytest.raises(ValueError) as raised:
        try:
            raise KeyError(f"no {FULL}")
        except KeyError as cause:
            raise ValueError(f"cannot use {FULL}", 1) from cause
    redact_error(raised.value)
    assert raised.value.args == (f"cannot use {STORED}", 1)
    assert raised.value.__cause__.args == (f"no {STORED}",)


def test_stored_text_stays_stored_text(monkeypatch):
    monkeypatch.setenv("DATABASE", "postgresql://me:s3cret@host/db")
    tree = as_stored_text({"a": ["plain", "postgresql://me:***@host/db", "http://a:b@c"]})
    for changed in (complete_tree(tree), redact_tree(tree)):
        assert {type(text) for text in changed["a"]} == {StoredText}
    assert complete_tree(tree)["a"][1] == "postgresql://me:s3cret@host/db"
