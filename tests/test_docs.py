"""Every command and snippet of README.md and docs/ runs; links and tables are up to date."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import executorch
import pytest
import safetensors.torch
import timm
import torch
from conftest import Result, make_images

import sdlora_edge
from sdlora_edge import errors

Cli = Callable[..., Result]
ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
GENERATED = {DOCS / "packet.md", DOCS / "configuration.md", DOCS / "reference" / "cli.md"}
"""described or checked by tests of their own"""
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]
PAGES += sorted(p for p in DOCS.rglob("*.md") if p not in GENERATED and p.parent.name != "adr")
RUN = {"sh", "python"}
SMALL = ["--backbone", "micro_vit", "--base-classes", "2", "--image-size", "16", "--epochs", "1"]
SMALL += ["--base-epochs", "2"]
WEIGHTS = ["--weights", "weights.safetensors", "--image-size", "32", "--epochs", "1", "--rank", "2"]
"""for a `train` that begins a run, of classes or of domains: else weights would be downloaded"""
SHELL = {"cp", "mkdir", "rm"}
SERVERS = {"https://fleet.example.com": "fleet", "https://reports.example.com": "reports.json"}
"""URLs of the pages, and what stands for them here: a file of the page's place"""


@dataclass(frozen=True)
class Block:
    """A fenced block. line: of its fence. reason: why it cannot run here, if the page says so."""

    page: Path
    line: int
    language: str
    text: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    pattern = re.compile(r"(?:<!-- not run: ([^\n]+) -->\n)?```(\w*)\n(.*?)^```$", re.S | re.M)
    text = page.read_text()
    for found in pattern.finditer(text):
        line = text.count("\n", 0, found.start(2)) + 1
        yield Block(page, line, found[2], found[3], found[1])


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a newcomer has: folders of images, a photo, and the weights of a backbone."""
    folder = tmp_path / "start"
    make_images(folder / "images", ["apple", "bolt", "cup", "disc", "egg", "fork"], 10)
    make_images(folder / "new_images", ["gear", "hook"], 10, seed=1)
    make_images(folder / "more_images", ["iron", "jar"], 10, seed=2)
    shutil.copy(folder / "images" / "cup" / "00.png", folder / "photo.png")
    torch.manual_seed(0)
    backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    safetensors.torch.save_file(backbone.state_dict(), folder / "weights.safetensors")
    monkeypatch.setenv("SDLORA_EDGE_PASSPHRASE", "five words of a test")
    return folder


@pytest.mark.long
def test_every_command_and_snippet_runs(
    cli: Cli, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each page runs in a copy of what "Getting started" leaves; that page and README start anew."""
    first = DOCS / "getting-started.md"
    places = {}
    for page in (ROOT / "README.md", first):
        places[page] = tmp_path / page.stem
        shutil.copytree(start, places[page])
    failures = []
    for page in [first, *(p for p in PAGES if p != first)]:
        todo = [b for b in blocks(page) if b.language in RUN and not b.reason]
        if page not in places and todo:
            places[page] = tmp_path / f"copy{len(places)}"
            shutil.copytree(places[first], places[page], symlinks=True)
        for block in todo:
            monkeypatch.chdir(places[page])
            try:
                _run(block, cli)
            except BaseException as error:  # a page's later blocks need the earlier ones
                failures.append(f"{block}: {error!r}")
                break
    assert not failures, "\n".join(failures)
    monkeypatch.chdir(places[ROOT / "README.md"])
    status = json.loads(cli("device", "status", "--store", "store", "--json").out)
    assert (status["task"], status["highest_task"]) == (2, 3)  # the weekly packet, rolled back


def _run(block: Block, cli: Cli) -> None:
    if block.language == "python":
        exec(compile(block.text, str(block), "exec"), {"__name__": "snippet"})  # noqa: S102
        return
    for line in block.text.replace("\\\n", "").splitlines():
        words = [found for w in shlex.split(line, comments=True) for found in _expanded(w)]
        words = [_url(SERVERS[w]) if w in SERVERS else w for w in words]
        words, file = (words[:-2], words[-1]) if ">" in words else (words, None)
        if words[:2] == ["sdlora-edge", "train"] and not {"--run", "--backbone"} & set(words):
            words += WEIGHTS if "domain" in words else SMALL
        if words and words[0] in SHELL:
            subprocess.run(words, check=True)
        elif words:
            assert words[0] == "sdlora-edge", f"no way to run {line!r}: say why with 'not run:'"
            result = cli(*words[1:])
            assert result.code == 0, f"{line}: {result}"
            if file is not None:
                Path(file).write_text(result.out)


def _url(name: str) -> str:
    return Path(name).resolve().as_uri()


def _expanded(word: str) -> list[str]:
    return sorted(str(p) for p in Path().glob(word)) if "*" in word and "'" not in word else [word]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_the_cpp_snippets_compile(tmp_path: Path) -> None:
    headers = Path(next(iter(executorch.__path__))) / "include"
    core = headers / "executorch" / "runtime" / "core" / "portable_type" / "c10"
    options = ["-w", "-std=c++17", "-fsyntax-only", "-DC10_USING_CUSTOM_GENERATED_MACROS"]
    for block in (b for page in PAGES for b in blocks(page) if b.language == "cpp"):
        top, _, rest = block.text.partition("\n\n")
        program = tmp_path / "program.cpp"
        program.write_text(f"{top}\nint main() {{\n{rest}\n}}\n")
        subprocess.run(["g++", *options, f"-I{headers}", f"-I{core}", program], check=True)


def test_what_does_not_run_has_a_reason_and_a_language() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert block.language, f"{block}: name the block's language"
            for named in re.findall(r"tests/[\w/.]+", block.reason or ""):
                assert (ROOT / named).exists(), f"{block}: {named} does not exist"


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, *GENERATED, *DOCS.rglob("adr/*.md"), *ROOT.glob("*.md")]:
        if not page.exists():
            continue
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.S)
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose):
            if "://" not in link and not link.startswith("mailto:"):
                assert (page.parent / link).exists(), f"{page.relative_to(ROOT)}: {link}"


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    """Dead links and anchors are errors, and no page loads anything from another host."""
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-d", str(tmp_path)],
        check=True,
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|link rel="stylesheet")[^>]*="https?:', page.read_text()
        )
        assert not loaded, page


def test_generated_pages_are_up_to_date() -> None:
    figures = [sys.executable, str(ROOT / "tests" / "bench" / "figures.py"), "--check"]
    subprocess.run(figures, check=True)
    module = importlib.util.spec_from_file_location("exit_codes", DOCS / "exit_codes.py")
    assert module is not None
    assert module.loader is not None
    exit_codes = importlib.util.module_from_spec(module)
    module.loader.exec_module(exit_codes)
    assert exit_codes.rendered() == exit_codes.PAGE.read_text(), "run: python docs/exit_codes.py"


def test_the_reference_names_the_whole_public_api() -> None:
    page = (DOCS / "reference" / "python.md").read_text()
    named = set(re.findall(r"^::: .*?(\w+)$", page, re.M))
    assert set(sdlora_edge.__all__) - named - set(vars(errors)) == set()


def _strings() -> list[str]:
    """Every string of the source; what is put into an f-string is left out."""
    found = []
    for path in [*(ROOT / "sdlora_edge").rglob("*.py"), *(ROOT / "export").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [p.value if isinstance(p, ast.Constant) else "\0" for p in parts]
            if all(isinstance(text, str) for text in texts):
                found.append("".join(texts))
    return found


def test_each_quoted_message_is_one_of_the_source() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", (DOCS / "troubleshooting.md").read_text(), re.M)
    assert len(rows) == len(set(rows)) >= 25
    source = _strings()
    patterns = {m: re.compile(".*".join(map(re.escape, m.split("…"))), re.S) for m in rows}
    unknown = [m for m, p in patterns.items() if not any(p.search(text) for text in source)]
    assert unknown == []
