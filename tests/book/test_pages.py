"""The pages of the book: built once without a warning, read as files, then looked at in a browser.

What the browser saw is kept in build/screenshots.
"""

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
from bs4 import BeautifulSoup
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = ROOT / "build" / "screenshots"
CHAPTERS = sorted(path.stem for path in (ROOT / "book").glob("[0-9]*.ipynb"))
CONTENTS = re.findall(r"^ *- file: book/(\w+)$", (ROOT / "book/_toc.yml").read_text(), re.M)
PAGES = ["index", *CONTENTS]
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

needs_chromium = pytest.mark.skipif(
    not CHROMIUM, reason="there is no Chromium to look at the pages with: apt-get install chromium"
)


def build(source: Path, out: Path) -> subprocess.CompletedProcess:
    """What `make book` runs."""
    options = ["--toc", "book/_toc.yml", "--path-output", str(out), "--all", "-W", "--keep-going"]
    return subprocess.run(
        [Path(sys.executable).with_name("jupyter-book"), "build", ".", *options, "--quiet"],
        cwd=source,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The folder of the built pages; of several workers the first builds them, the others wait."""
    place = tmp_path_factory.getbasetemp()
    out = (place.parent if "PYTEST_XDIST_WORKER" in os.environ else place) / "pages"
    with FileLock(f"{out}.lock"):
        if not out.exists():
            done = build(ROOT, out)
            assert done.returncode == 0, done.stdout + done.stderr
    return out / "_build" / "html"


@pytest.fixture(scope="session")
def parsed(site) -> dict[str, BeautifulSoup]:
    """All pages by their path below the site."""
    return {
        path.relative_to(site).as_posix(): BeautifulSoup(path.read_text(), "html.parser")
        for path in [*site.glob("*.html"), *site.glob("book/*.html")]
    }


def article(parsed, page: str) -> BeautifulSoup:
    return parsed[f"book/{page}.html"].find("article")


def test_every_chapter_is_in_the_table_of_contents():
    assert [name for name in CONTENTS if name[0].isdigit()] == CHAPTERS


def test_equations_have_the_papers_numbers_and_are_referred_to_by_links(parsed):
    numbers, links = {}, set()
    for page in PAGES:
        for equation in article(parsed, page).find_all(id=re.compile("^equation-eq-")):
            numbers[equation["id"]] = equation.find(class_="eqno").get_text().strip("()#¶ \n")
        for link in article(parsed, page).find_all("a", href=re.compile("#equation-eq-")):
            target = link["href"].partition("#")[2]
            if "headerlink" not in link.get("class", []):
                links.add(target)
                assert link.get_text() == f"({target.rpartition('-')[2]})"
    assert numbers == {f"equation-eq-{n}": str(n) for n in range(1, 10)}
    assert links == set(numbers)


def test_every_picture_has_a_number_a_caption_and_alternative_text(parsed):
    figures = {}
    for page in PAGES:
        for picture in article(parsed, page).find_all("img"):
            described = picture.get("alt", "")
            assert len(described) > 20 and "/" not in described.split(" ")[0], (page, described)
            figure = picture.find_parent("figure")
            assert figure, f"{page}: a picture without a caption ({described})"
            caption = figure.find("figcaption")
            number = caption.find(class_="caption-number").get_text(strip=True)
            assert caption.find(class_="caption-text").get_text(strip=True), (page, number)
            assert number not in figures, f"{number} is there twice"
            figures[number] = page
    assert set(CHAPTERS) <= set(figures.values())
    for number, page in figures.items():
        place = CHAPTERS.index(page) + 1 if page in CHAPTERS else None
        assert page == "index" or number.startswith(f"Figure {place}.")
    listed = article(parsed, "index").find(id="figures").find_all("a", string=re.compile("^Figure"))
    assert {link.get_text() for link in listed} == {n for n in figures if "." in n}


def test_every_work_of_the_bibliography_is_cited_and_listed_once(parsed):
    keys = re.findall(r"^@\w+\{(\w+),", (ROOT / "book/references.bib").read_text(), re.M)
    assert len(article(parsed, "references").find_all(class_="citation")) == len(keys)
    text = "".join(path.read_text() for path in (ROOT / "book").glob("*.md"))
    cited = re.findall(r"\{cite:[pt]\}`([\w,]+)`", text)
    assert set(",".join(cited).split(",")) == set(keys)


def test_no_link_and_no_picture_leads_nowhere(parsed, site):
    anchors = {page: {tag["id"] for tag in soup.find_all(id=True)} for page, soup in parsed.items()}
    broken = []
    for page, soup in parsed.items():
        for tag in soup.find_all(["a", "img", "link", "script"]):
            address, anchor = urldefrag(tag.get("href") or tag.get("src") or "")
            if urlsplit(address).scheme or (not address and not anchor):
                continue
            path = unquote(urlsplit(address).path)
            target = (site / page).parent / path if path else site / page
            name = os.path.relpath(target, site)
            if not target.is_file() or (anchor and anchor not in anchors.get(name, {anchor})):
                broken.append((page, address, anchor))
    assert not broken


def test_chapters_can_be_downloaded_and_opened_in_jupyterlab(parsed, site):
    port = re.search(r"jupyter lab book --port (\d+)", (ROOT / "Makefile").read_text())[1]
    for chapter in CHAPTERS:
        links = {a["href"] for a in parsed[f"book/{chapter}.html"].find_all("a", href=True)}
        assert f"http://localhost:{port}/lab/tree/{chapter}.ipynb" in links
        assert f"../_sources/book/{chapter}.ipynb" in links
        committed = (ROOT / "book" / f"{chapter}.ipynb").read_bytes()
        assert (site / "_sources" / "book" / f"{chapter}.ipynb").read_bytes() == committed


def test_binder_and_colab_come_with_the_projects_address_and_warnings_fail_a_build(
    parsed, tmp_path
):
    config = (ROOT / "_config.yml").read_text()
    hosts = re.compile("mybinder|colab")
    if 'url: ""' in config:
        assert not any(soup.find_all("a", href=hosts) for soup in parsed.values())
    address = "https://github.com/someone/something"
    small = re.sub(r"(?m)^  url: .*$", f"  url: {address}", config)
    (tmp_path / "_config.yml").write_text(small)
    shutil.copytree(ROOT / "book", tmp_path / "book", ignore=shutil.ignore_patterns("[0-9]*"))
    shutil.copy(ROOT / "book" / f"{CHAPTERS[0]}.ipynb", tmp_path / "book")
    (tmp_path / "book/index.md").write_text("# Book\n")
    toc = f"format: jb-book\nroot: book/index\nchapters:\n  - file: book/{CHAPTERS[0]}\n"
    (tmp_path / "book/_toc.yml").write_text(toc)
    done = build(tmp_path, tmp_path / "out")
    assert done.returncode != 0  # since its links to other chapters are broken
    assert "WARNING" in done.stdout + done.stderr
    page = tmp_path / "out/_build/html/book" / f"{CHAPTERS[0]}.html"
    links = [
        a["href"] for a in BeautifulSoup(page.read_text(), "html.parser").find_all("a", href=True)
    ]
    place = f"book/{CHAPTERS[0]}.ipynb"
    assert address in links
    assert f"https://colab.research.google.com/github/someone/something/blob/main/{place}" in links
    assert f"https://mybinder.org/v2/gh/someone/something/main?urlpath=lab/tree/{place}" in links


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def server(site):
    """The address under which the pages are served on this machine."""
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, server):
    """A tab of a wide window that must see no error and ask nobody but our server."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900}, base_url=server)
    wrong = []
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("console", lambda said: said.type == "error" and wrong.append(said.text))
    tab.on(
        "response",
        lambda answer: answer.status < 400 or wrong.append(f"{answer.status} {answer.url}"),
    )
    tab.on("request", lambda asked: asked.url.startswith(server) or wrong.append(asked.url))
    yield tab
    tab.close()
    assert not wrong


# What is read, without code and signatures; formulas count as what MathJax made of them.
READ = """() => {
    const copy = document.querySelector('article').cloneNode(true);
    const written = 'pre, code, dt.sig, mjx-container, script, style';
    copy.querySelectorAll(written).forEach(tag => tag.remove());
    return copy.textContent;
}"""
SOURCE = re.compile(r"\$|\\[a-zA-Z(\[]|\{[a-z:-]+\}|`|:::|\]\(|\*\*")
CUT_OFF = """() => {
    document.querySelectorAll('details').forEach(folded => folded.open = true);
    const code = [...document.querySelectorAll('article pre')];
    return code.filter(pre => pre.scrollWidth > pre.clientWidth).map(pre => pre.textContent);
}"""
TYPESET = "() => MathJax.startup.promise.then(() => true)"


@needs_chromium
@pytest.mark.parametrize("page", PAGES)
def test_page_in_a_browser(page, tab):
    tab.goto(f"/book/{page}.html")
    if tab.evaluate("!!document.querySelector('.math')"):
        tab.wait_for_function("window.MathJax && MathJax.startup && MathJax.startup.promise")
        assert tab.evaluate(TYPESET)
    tab.screenshot(path=SCREENSHOTS / f"{page}-wide.png", full_page=True)
    assert not SOURCE.findall(tab.evaluate(READ))
    assert tab.locator("mjx-merror").count() == 0
    assert not tab.evaluate("[...document.images].filter(i => !i.naturalWidth).map(i => i.src)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 1280
    assert not tab.evaluate(CUT_OFF)

    tab.add_style_tag(content="* { transition: none !important; }")  # sidebars are gone at once
    tab.set_viewport_size({"width": 390, "height": 844})
    tab.screenshot(path=SCREENSHOTS / f"{page}-phone.png", full_page=True)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390


@needs_chromium
@pytest.mark.parametrize("page", ["index", "05_figure_1"])
def test_page_is_dark_where_the_reader_wants_it_dark(page, tab):
    background = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    tab.goto(f"/book/{page}.html")
    assert min(tab.evaluate(background)[:3]) > 200
    tab.emulate_media(color_scheme="dark")
    tab.reload()
    assert max(tab.evaluate(background)[:3]) < 60
    tab.screenshot(path=SCREENSHOTS / f"{page}-dark.png", full_page=True)
    tab.locator("button.theme-switch-button").first.click()  # from the system's choice to light
    assert min(tab.evaluate(background)[:3]) > 200


@needs_chromium
def test_search_finds_what_a_chapter_says(tab):
    tab.goto("/search.html?q=hypergradient")
    results = tab.locator("#search-results a")
    results.first.wait_for()
    assert any(
        "03_hypergradients" in link for link in results.evaluate_all("all => all.map(a => a.href)")
    )
