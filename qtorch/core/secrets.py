"""Passwords and tokens: remove them from what is stored or shown, and complete stored URLs again.

A complete URL is in the user's configuration and environment, and in the memory of processes.
Wherever else a URL goes (a store, a file, the screen), `redact_urls` replaces its secrets by `***`.
A process that reads such a URL completes it from its own configuration (`complete_url`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from qtorch.core.errors import ConfigError
from qtorch.core.session import session

MASK = "***"
URLS_VARIABLE = "QTORCH_URLS"  # complete URLs for child processes, as a JSON list

_SCHEME = r"(?<![A-Za-z0-9+.\-])[A-Za-z0-9+.\-]+://"
# In running text a URL ends at a space or a quotation mark. A word that is one URL, perhaps after
# `key=`, ends at its end.
_URL_IN_TEXT = re.compile(rf"({_SCHEME})([^\s\"<>]*)")
_URL_IN_WORD = re.compile(rf"({_SCHEME})(\S*)")
_WORD = re.compile(rf"[^\s\"'<>]*?{_SCHEME}\S*")
_NESTED_URL = re.compile(rf"(?<=[,;|=&'(){{}}\[\]]){_SCHEME}")
_AUTHORITY = re.compile(r"[^/?#]*")
_HOSTS = re.compile(r"(\[[^\]]*\]|[^:,]*)(:\d*)?(,(\[[^\]]*\]|[^:,]*)(:\d*)?)*")
# Schemes whose lone user (`https://TOKEN@host`) is a token. In those of databases it is a name.
_TOKEN_SCHEMES = ("http", "https", "ws", "wss")
_NO_PASSWORDS = ("", "x-oauth-basic")  # after a token in the place of the user
_SECRET_WORDS = (
    r"passwo?r?d|passphrase|pwd|secret|token(?!s)|api[_-]?key|access[_-]?key|private[_-]?key"
    r"|credentials?"
)
_QUERY_KEY = (
    rf"[\w.\-]{{0,40}}(?:{_SECRET_WORDS}|signature)[\w.\-]{{0,40}}"
    r"|pass|key|auth|sig|odbc_connect|authMechanismProperties"
)
_QUERY_IN_TEXT = re.compile(rf"([?&;#](?:{_QUERY_KEY})=)([^&\s\"'<>]+)", re.IGNORECASE)
_QUERY_IN_WORD = re.compile(rf"([?&;#](?:{_QUERY_KEY})=)([^&\s]+)", re.IGNORECASE)

_TOKENS = re.compile(
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"  # AWS
    r"|\bgh[a-z]_\w{16,}|\bgithub_pat_\w{16,}|\bglpat-[\w\-]{16,}"  # GitHub, GitLab
    r"|\bsk-[\w\-]{16,}|\bxox[a-z]-[\w\-]{8,}|\bhf_\w{16,}|\bdapi[0-9a-f]{32}\b|\bAIza[\w\-]{30,}"
    r"|\beyJ[\w\-]{8,}\.[\w\-]{8,}\.[\w\-]*"  # JSON web token
    r"|(?<=\b[Bb]earer )[\w\-.~+/=]{8,}|(?<=\b[Bb]asic )[\w+/=]{8,}"
    r"|-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY-----|\Z)",
    re.DOTALL,
)
_SECRET_NAME = rf"(?:{_SECRET_WORDS})(?![a-z])\w*"
_QUOTED_VALUE = re.compile(
    rf"({_SECRET_NAME}[\"']?\s*(?::\s*\w+\s*)?[:=]=?>?\s*[a-z]?)([\"'])((?:\\.|(?!\2)[^\\\n])+)\2",
    re.IGNORECASE,
)
# A bare value: not a number, a type or a constant, nor the beginning of code such as `get(`.
_BARE_VALUE = re.compile(
    rf"({_SECRET_NAME}\s*[:=]\s*)"
    r"(?!(?:str|bytes|int|bool|Any|None|null|true|false|Optional|\d+(?:\.\d+)?)(?:[^\w]|$))"
    r"([^\s\"'()\[\]{},;<>=|*$][^\s\"'()\[\]{},;<>]{2,})(?![(\[{.])(?=[\s\"'),;\]}<>]|$)",
    re.IGNORECASE,
)

_urls: dict[str, str] = {}  # the complete URLs that this process has used, by their stored form


def redact_urls(text: str) -> str:
    """Replace passwords and tokens in the URLs of a text by `***`; other text stays as it is.

    They are found in front of the host (`user:password@`, `token@`), also with characters that
    should be percent-encoded, and in the query (`?password=`, `?token=`, ...).
    """
    if "://" not in text and "=" not in text:
        return text
    is_word = _WORD.fullmatch(text) is not None
    text = (_URL_IN_WORD if is_word else _URL_IN_TEXT).sub(_redact_match, text)
    return (_QUERY_IN_WORD if is_word else _QUERY_IN_TEXT).sub(rf"\1{MASK}", text)


def redact_secrets(text: str) -> str:
    """Replace secrets in a text such as a diff: those of URLs, well-known tokens, and passwords.

    These are keys of AWS, GitHub, OpenAI, Slack and others, PEM blocks of private keys, and the
    values in `password = "..."`, `token: ...` and `API_KEY=...`.
    """
    text = _TOKENS.sub(MASK, redact_urls(text))
    text = _QUOTED_VALUE.sub(rf"\1\2{MASK}\2", text)
    return _BARE_VALUE.sub(rf"\1{MASK}", text)


def is_secret_name(name: str) -> bool:
    """Whether a variable with this name holds a secret."""
    return re.search(_SECRET_NAME, name, re.IGNORECASE) is not None


def _redact_match(match: re.Match[str]) -> str:
    """Redact the part of a URL before its host, and the URLs that follow in the same word."""
    scheme, rest = match[1], match[2]
    end = _find_userinfo_end(scheme, rest)
    userinfo, rest = rest[:end], rest[end:]
    if "://" in rest:
        rest = _URL_IN_WORD.sub(_redact_match, rest)
    return f"{scheme}{_redact_userinfo(scheme, userinfo)}{rest}"


def _find_userinfo_end(scheme: str, rest: str) -> int:
    """Return where `user:password@` ends in a URL after its scheme; 0 without one.

    A password may contain every character, also those that should be percent-encoded. In doubt
    too much is taken for the password: it ends at the last @ of the word.
    """
    stops = [match for regex in (_NESTED_URL, _QUERY_IN_WORD) if (match := regex.search(rest))]
    limit = min((match.start() for match in stops), default=len(rest))
    authority = _AUTHORITY.match(rest, 0, limit)
    assert authority is not None
    userinfo, at, hosts = authority[0].rpartition("@")
    if ":" in userinfo:
        return rest.rindex("@", 0, limit) + 1
    # A "port" that is no number is the beginning of a password with a slash, ? or #. SQLAlchemy
    # also reads postgresql://user:12/34@host so.
    has_port = ":" in hosts and not hosts.startswith("[")
    if not _HOSTS.fullmatch(hosts):
        end = rest.rfind("@", 0, limit)
        return (rest.rfind("@") if end < 0 else end) + 1
    if has_port and not at and not _is_token_scheme(scheme):
        return rest.rfind("@", 0, limit) + 1
    return len(userinfo) + len(at)


def _redact_userinfo(scheme: str, userinfo: str) -> str:
    if not userinfo:
        return ""
    user, colon, password = userinfo[:-1].partition(":")
    if _is_token_scheme(scheme) and password in _NO_PASSWORDS:
        user = user and MASK
    return f"{user}{colon}{password and MASK}@"


def _is_token_scheme(scheme: str) -> bool:
    return scheme[: -len("://")].lower().rpartition("+")[2] in _TOKEN_SCHEMES


# -- complete URLs ---------------------------------------------------------------------------------


def complete_url(url: str) -> str:
    """Return a URL with its secrets, if it was stored without them and this process knows them.

    Sources are the URLs that this process has used, `init(...)`, and all environment variables;
    first one that is stored in the same form, then one of the same scheme, hosts and path, which
    may have other credentials. Otherwise the URL is returned as it is (see `has_mask`).
    """
    redacted_url = redact_urls(url)
    if redacted_url != url:
        _urls[redacted_url] = url
        return url
    if not has_mask(url):
        return url
    candidates = list(_find_urls())
    for key in (redact_urls, _remove_secrets):
        for candidate in candidates:
            if key(candidate) == key(url):
                return candidate
    return url


def has_mask(text: str) -> bool:
    """Whether a text is a URL whose secret is missing."""
    return "://" in text and MASK in text


def check_complete(url: str, setting: str, error: type[Exception] = ConfigError) -> str:
    """Return the complete URL; raise `error` if its secret is missing, which names the setting."""
    complete = complete_url(url)
    if has_mask(complete):
        raise error(
            f"{complete} is stored without its password, and this process has no URL of the same "
            f"address: set {setting} to the complete URL."
        )
    return complete


def check_encoding(url: str, error: type[Exception] = ConfigError) -> None:
    """Raise `error` if characters of a URL's password end it too early for the usual parsers."""
    match = _URL_IN_WORD.match(url)
    if match is None:
        return
    userinfo = match[2][: _find_userinfo_end(match[1], match[2])]
    if re.search(r"[/?#@]", userinfo[:-1].partition(":")[2]):
        raise error(
            f"the password in {redact_urls(url)} contains one of the characters / ? # @: write "
            "them as %2F %3F %23 %40."
        )


def url_variables() -> dict[str, str]:
    """Return the environment variable with which a child process completes the same URLs."""
    urls = [*_urls.values(), *_read_url_variable()]
    return {URLS_VARIABLE: json.dumps(list(dict.fromkeys(urls)))} if urls else {}


def _find_urls() -> Iterator[str]:
    yield from reversed(_urls.values())
    yield from filter(None, (session().tracking_uri, session().task_url))
    yield from _read_url_variable()
    yield from (v for k, v in os.environ.items() if "://" in v and k != URLS_VARIABLE)


def _read_url_variable() -> list[str]:
    urls: list[str] = json.loads(os.environ.get(URLS_VARIABLE, "[]"))
    return urls


def _remove_secrets(url: str) -> str:
    """Return what identifies a URL's server and database: scheme, hosts, path, other options."""
    scheme, _, rest = redact_urls(url).partition("://")
    rest = re.sub(r"^[^/?#]*@", "", rest)
    rest = re.sub(rf"[?&][^?&=]*={re.escape(MASK)}", "", rest)
    return f"{scheme.partition('+')[0]}://{rest.rstrip('/')}"


# -- nested values ---------------------------------------------------------------------------------


def redact_tree(value: Any) -> Any:
    """Return dicts, lists and tuples with the secrets of the URLs in them replaced."""
    return _convert_texts(value, redact_urls)


def complete_tree(value: Any) -> Any:
    """Return dicts, lists and tuples with the URLs in them completed, as far as possible."""
    return _convert_texts(value, complete_url)


def _convert_texts(value: Any, convert: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        text = convert(value)
        return value if text == value else type(value)(text)  # `StoredText` stays `StoredText`
    if type(value) is dict:
        return {key: _convert_texts(part, convert) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_convert_texts(part, convert) for part in value)
    return value


def redact_error(error: BaseException) -> None:
    """Replace the secrets in the messages of an exception and of its causes, for tracebacks."""
    current: BaseException | None = error
    while current is not None:
        current.args = redact_tree(current.args)
        if isinstance(getattr(current, "message", None), str):
            current.message = redact_urls(current.message)  # type: ignore[attr-defined]  # of MLflow's errors
        current = current.__cause__ or current.__context__
