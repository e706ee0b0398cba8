"""URLs in texts for people: no password is shown, however the URL is written."""

import pytest

from hub.urls import check_redis_url, shown_text, shown_url

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("redis://:hunter2@host:6379/0", "redis://...@host:6379/0"),
        ("rediss://user:hunter2@[::1]:6379/0", "rediss://...@[::1]:6379/0"),
        ("redis://:a/hunter2?b#c@d@host:6379/0", "redis://...@host:6379/0"),  # not escaped
        ("redis://host/0?password=hunter2&db=1", "redis://host/0?password=...&db=1"),
        ("redis://:hunter2", "redis://..."),  # the host is missing
        ("redis://user:hunter2/0", "redis://..."),
        ("user:hunter2@host", "...@host"),
        ("unix:///run/redis.sock?db=1&password=hunter2", "unix:///run/redis.sock?db=1&password=..."),
        ("redis+sentinel://:hunter2@a:1,b:2/primary/0", "redis+sentinel://...@a:1,b:2/primary/0"),
        ("s3://key:hunter2@bucket/prefix", "s3://...@bucket/prefix"),
        ("simplecache::s3://key:hunter2@bucket", "simplecache::s3://...@bucket"),
        ("s3://bucket/prefix", "s3://bucket/prefix"),
        ("/data/with@sign", "/data/with@sign"),
        ("https://host/a?X-Amz-Signature=hunter2", "https://host/a?X-Amz-Signature=..."),
        ("", ""),
    ],
)
def test_a_shown_url_has_no_password(url: str, shown: str) -> None:
    assert shown_url(url) == shown
    assert SECRET not in shown_url(url)


@pytest.mark.parametrize(
    "text",
    [
        "cannot open s3://key:hunter2@bucket/x, retry",
        "Port could not be cast to integer value as 'hunter2'",
        "unknown command `AUTH`, with args beginning with: `hunter2`",
    ],
)
def test_a_shown_text_has_no_password(text: str) -> None:
    shown = shown_text(text, "redis://user:hunter2")
    assert SECRET not in shown
    assert "..." in shown


def test_a_decoded_password_is_hidden_too() -> None:
    assert shown_text("bad 'a/b/c'", "redis://:a%2Fb%2Fc@host") == "bad '...'"


@pytest.mark.parametrize(
    "url",
    [
        "redis://host",
        "redis://user:p%40ss@host:6379/3?socket_timeout=2",
        "rediss://[::1]:6379/0",
        "unix:///run/redis.sock?db=2",
        "unix:///tmp/with%40sign.sock",
    ],
)
def test_a_redis_url_is_accepted(url: str) -> None:
    check_redis_url(url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "must start with redis://, rediss:// or unix://"),
        ("hunter2", "must start with redis://"),
        ("http://host", "must start with redis://"),
        ("redis://:hunter2", "the URL is not valid"),
        ("redis://:p/hunter2@host", "Escape the characters"),
        ("redis://:p#hunter2@host", "Escape the characters"),
        ("redis://host:99999999", "the URL is not valid"),
        ("redis://", "names no host"),
        ("unix://", "names no socket"),
        ("redis://host/main", "must be a number"),
        ("redis://a:1,b:2/0", "several servers|not valid"),
        ("redis+sentinel://:hunter2@a:26379/primary", "Sentinel URLs are not supported"),
        ("sentinel://a:26379", "Sentinel URLs are not supported"),
        ("redis+cluster://a:6379", "Redis Cluster is not supported"),
    ],
)
def test_a_redis_url_is_refused_without_showing_its_password(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check_redis_url(url)
    assert SECRET not in str(caught.value)
