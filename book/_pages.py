"""What the pages need beyond Jupyter Book's settings: a Sphinx extension, named in _config.yml."""

from __future__ import annotations

import re

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.domains.math import MathDomain
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

JUPYTERLAB = "http://localhost:8877/lab/tree"  # where `make lab` serves the folder book/


class PaperMath(MathDomain):
    """Equations with the paper's numbers: the label eq-5 is equation 5, in whatever chapter."""

    def note_equation(self, docname: str, labelid: str, location=None) -> None:
        super().note_equation(docname, labelid, location)
        paper = re.fullmatch(r"eq-([1-9])", labelid)
        if paper is None:
            raise ExtensionError(
                f"{docname} labels an equation {labelid!r}; only the paper's equations have "
                "labels, eq-1 to eq-9"
            )
        self.equations[labelid] = (docname, int(paper[1]))


class FigureList(nodes.General, nodes.Element):
    """Stands for the list of all figures until all pages are read."""


class Figures(SphinxDirective):
    """The index of figures."""

    def run(self) -> list[nodes.Node]:
        return [FigureList()]


def list_figures(app, doctree, docname: str) -> None:
    """Put a list in the place of FigureList: the chapters, and under each its figures by number."""
    for place in list(doctree.findall(FigureList)):
        env, chapters = app.env, nodes.bullet_list()
        for other in env.toctree_includes[app.config.root_doc]:
            numbers = env.toc_fignumbers.get(other, {}).get("figure", {})
            entries = nodes.bullet_list()
            for figure in env.get_doctree(other).findall(nodes.figure):
                number = ".".join(map(str, numbers[figure["ids"][0]]))
                uri = app.builder.get_relative_uri(docname, other) + "#" + figure["ids"][0]
                link = nodes.reference("", f"Figure {number}", refuri=uri, internal=True)
                caption = figure.next_node(nodes.caption)
                text = nodes.paragraph("", "", link, nodes.Text(": "), *first_sentence(caption))
                entries += nodes.list_item("", text)
            if len(entries):
                uri = app.builder.get_relative_uri(docname, other)
                number = ".".join(map(str, env.toc_secnumbers[other][""]))
                title = [child.deepcopy() for child in env.titles[other].children]
                link = nodes.reference("", f"{number}. ", *title, refuri=uri, internal=True)
                chapters += nodes.list_item("", nodes.paragraph("", "", link), entries)
        place.replace_self(chapters)


def first_sentence(caption: nodes.Element) -> list[nodes.Node]:
    result = []
    for child in caption.children:
        if isinstance(child, nodes.Text) and ". " in child:
            return [*result, nodes.Text(child.partition(". ")[0] + ".")]
        # A reference to a figure is not resolved yet: its text alone
        unresolved = isinstance(child, pending_xref)
        result.append(nodes.Text(child.astext()) if unresolved else child.deepcopy())
    return result


def address(app, config) -> None:
    """Repository, Binder and Colab buttons only once _config.yml has the project's address."""
    options = config.html_theme_options
    if options.get("repository_url"):
        options |= {"use_repository_button": True, "use_issues_button": True}
    else:
        options.pop("launch_buttons", None)


def jupyterlab_button(app, pagename, templatename, context, doctree) -> None:
    """A button that opens the chapter's notebook in the JupyterLab of `make lab`."""
    if context.get("page_source_suffix") != ".ipynb":
        return
    button = {
        "type": "link",
        "url": f"{JUPYTERLAB}/{pagename.rpartition('/')[2]}.ipynb",
        "tooltip": "Open in JupyterLab, while make lab runs",
        "icon": "fas fa-flask",
        "label": "jupyterlab-button",
    }
    context["header_buttons"].insert(0, button)


def returns(app, what, name, obj, options, lines: list[str]) -> None:
    """Napoleon would take what a text under "Returns:" says before a colon for a type."""
    lines[:] = [":Returns:" if line == "Returns:" else line for line in lines]


def setup(app) -> dict:
    app.add_domain(PaperMath, override=True)
    app.add_node(FigureList)
    app.add_directive("figures", Figures)
    app.connect("doctree-resolved", list_figures)
    app.connect("config-inited", address)
    app.connect("html-page-context", jupyterlab_button, priority=900)
    app.connect("autodoc-process-docstring", returns, priority=400)  # before napoleon
    return {"parallel_read_safe": True}
