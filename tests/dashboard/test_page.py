"""The page: served as files, whole, and under a policy that lets nothing else in."""

import re
import tomllib
from pathlib import Path

import pytest

from dspark_server.api.dashboard import PAGES, STATIC

from .support import Running, serving

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", PAGES)
def test_every_file_is_served_with_its_type_under_a_strict_policy(server: Running, path: str) -> None:
    answer = server.http.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == PAGES[path][1]
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'self';") and "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.content == (STATIC / PAGES[path][0]).read_bytes()


def test_no_file_is_forgotten_and_all_are_packaged() -> None:
    assert {path.name for path in STATIC.iterdir()} == {name for name, _ in PAGES.values()}
    package_data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "api/static/*" in package_data["dspark_server"]


def test_nothing_comes_from_elsewhere_and_no_text_becomes_markup() -> None:
    for name, _ in PAGES.values():
        text = (STATIC / name).read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//cdn|@import|url\(", text), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text), name
    page = (STATIC / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son[a-z]+=", page)
    assert sum((STATIC / name).stat().st_size for name, _ in PAGES.values()) < 60_000


def test_with_a_key_the_page_is_open_and_all_that_it_shows_is_closed() -> None:
    with serving(api_key=("sesame",)) as server:
        assert all(server.http.get(path).status_code == 200 for path in PAGES)
        assert server.http.get("/dashboard/feed").status_code == 401
        for name in ("prompt", "stop", "load", "policy"):
            assert server.post(name).status_code == 401
        server.http.headers["Authorization"] = "Bearer sesame"
        with server.feed() as feed:
            assert feed.state()["health"] == "ready"
