"""The documentation: its code runs, its commands exist, and it makes a site without a warning."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

import coopflow_ext as cf

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
_BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What an example may need beside the package; where one is missing its page is skipped.
OPTIONAL = {"torchebm": "torchebm", "zuko": "zuko", "coop.train(": "sklearn"}


def blocks(page: Path, language: str) -> list[str]:
    return [text for info, text in _BLOCK.findall(page.read_text()) if info == language]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# export.md is two processes: test_export.py runs it.
WITH_PYTHON = [p for p in PAGES if blocks(p, "python") and p.name != "export.md"]


def test_blocks_name_a_language_that_is_tested() -> None:
    """Python runs and commands exist; C++ is the one example of CONTRIBUTING.md."""
    found = {
        info: sum(text.count(f"```{info}\n") for text in map(Path.read_text, PAGES))
        for page in PAGES
        for info, _ in _BLOCK.findall(page.read_text())
    }
    assert found.keys() == {"python", "", "cpp"}
    assert found["cpp"] == 1


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_the_python_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its blocks in order, as one program, in an empty folder."""
    code = blocks(page, "python")
    for sign, package in OPTIONAL.items():
        if any(sign in block for block in code):
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, block in enumerate(code, 1):
        exec(compile(block, f"{name(page)}, block {number}", "exec"), names)


def commands(page: Path) -> list[str]:
    """The lines of its blocks without a language, and of those that are indented, which begin with
    a program; without comments."""
    text = page.read_text()
    indented = re.findall(r"(?:^|(?<=\n\n))((?:    .*\n)+)", _BLOCK.sub("", text))
    lines = [line for block in (*blocks(page, ""), *indented) for line in block.splitlines()]
    return [re.split(r"  +#", line.strip())[0] for line in lines]


def test_commands_exist() -> None:
    """Programs, scripts and targets; test_cli.py looks at the arguments of coopflow."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    known = {"coopflow", "torchrun", "pip", "pytest", "pytest-benchmark"}
    modules = {"pytorch_fid", "timeit"}
    count = 0
    for page in PAGES:
        for line in commands(page):
            program, *rest = line.split() or ["#"]
            if program == "make":
                assert rest[0] in targets, line
            elif program == "python" and rest[0] == "-m":
                assert rest[1] in modules, line
            elif program == "python" or program.endswith(".sh"):
                script = rest[0] if program == "python" else program
                assert (ROOT / script).is_file(), line
            elif program not in known:
                continue  # code in another language, or a program's output
            count += 1
        for target in re.findall(r"`make (\w+)", page.read_text()):
            assert target in targets, target
    assert count > 30


# --- the site -------------------------------------------------------------------------------------

needs_mkdocs = pytest.mark.skipif(
    not (find_spec("material") and find_spec("mkdocstrings")),
    reason="mkdocs-material or mkdocstrings is missing: pip install 'coopflow-ext[docs]'",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, made as `make docs` does: a warning or a link that leads nowhere is an error."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


class _Names(HTMLParser):
    """Ids of elements, and what a browser fetches for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.ids.add(given.get("id") or "")
        address = given.get("src") or (given.get("href") if tag == "link" else None)
        if address and given.get("rel") != "canonical":
            self.fetched.append(address)


def parsed(*pages: Path) -> _Names:
    names = _Names()
    for page in pages:
        names.feed(page.read_text())
    return names


@needs_mkdocs
def test_every_page_is_in_the_site(site: Path) -> None:
    made = {path.relative_to(site).with_suffix("").as_posix() for path in site.rglob("*.html")}
    theirs = {"README": "index", "CONTRIBUTING": "contributing", "SECURITY": "security"}
    assert {theirs.get(page.stem, page.stem) for page in PAGES} <= made
    assert {"changelog", "benchmarks/results/h100/table"} <= made
    assert "Made by" in (site / "index.html").read_text()
    for page in (site / "api").glob("*.html"):
        assert not re.search(r":(class|func|meth|mod):", page.read_text()), page
    assert (site / "examples" / "jem_loop.py").is_file()


@needs_mkdocs
def test_links_in_code_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "site"))
    pages = importlib.import_module("pages")
    text = "[a](b.md) `[a](b.md)`\n```\n[a](b.md)\n```\n[a](b.md#c)"
    changed = pages.outside_code(pages._LINK, r"\1B\3", text)
    assert changed == "[a](B) `[a](b.md)`\n```\n[a](b.md)\n```\n[a](B#c)"
    assert pages.place(ROOT / "README.md") == "index.md"
    assert pages.place(ROOT / "docs" / "runs.md") == "runs.md"
    assert pages.place(ROOT / "examples" / "jem_loop.py") == "examples/jem_loop.py"


@needs_mkdocs
def test_calls_of_samplers_are_documented(site: Path) -> None:
    ids = parsed(site / "api" / "samplers.html").ids
    for sampler in ("LangevinSampler", "MALASampler", "UnderdampedLangevinSampler"):
        assert f"coopflow_ext.{sampler}.__call__" in ids


@needs_mkdocs
def test_the_site_needs_no_network(site: Path) -> None:
    names = parsed(*site.rglob("*.html"))
    assert len(names.fetched) > 100
    assert [address for address in names.fetched if re.match(r"(https?:)?//", address)] == []
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text()), style


PUBLIC = [
    cf,
    *(getattr(cf, n) for n in cf.__all__ if isinstance(getattr(cf, n), ModuleType)),
    importlib.import_module("coopflow_ext.samplers"),
]


@needs_mkdocs
@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_every_public_name_is_in_the_api_pages(site: Path, module: ModuleType) -> None:
    """Modules by what they hold; what stands in the package itself, under that name alone."""
    ids = parsed(*(site / "api").glob("*.html"), site / "presets.html").ids
    public = getattr(module, "__all__", None) or [
        n for n, f in vars(module).items() if getattr(f, "__module__", "") == module.__name__
        if not n.startswith("_")
    ]  # fmt: skip
    assert len(public) > 3
    for member in public:
        if not isinstance(getattr(module, member), ModuleType) and member != "__version__":
            assert {f"{module.__name__}.{member}", f"coopflow_ext.{member}"} & ids, member
