"""What the site needs beyond Sphinx: live charts, formulas without a script, and pages made from code and results."""

import ast
import importlib
import inspect
import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import vl_convert
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.ext.napoleon.docstring import GoogleDocstring
from sphinx.pycode import ModuleAnalyzer

import granq
from granq.measure.workbench import PUBLISHED, method_name, published_results

ROOT = Path(__file__).parents[2]
GENERATED = ROOT / "docs/generated"  # git ignores it
CHART = "application/vnd.vegalite.v5+json"


def found(*patterns: str) -> list[str]:
    """Return the files that fit these patterns, as Sphinx names them."""
    return [path.relative_to(ROOT).with_suffix("").as_posix() for x in patterns for path in sorted(ROOT.glob(x))]


FIRST = ["notebooks/README", "figures/README", "docs/method", "docs/results", "docs/generated/api"]
RESULTS = ["docs/generated/table", "docs/speed", "docs/reproduction", "docs/reliability", "benchmarks/README"]
RESULTS += found("granq/*/README.md")
#: the pages below a page
CONTENTS = {
    "README": FIRST + [name for name in found("docs/*.md", "[!R]*.md") if name not in FIRST + RESULTS],
    "notebooks/README": [*found("notebooks/[!s]*.ipynb"), "notebooks/solutions"],
    "docs/results": RESULTS,
}
SHORT = {"docs/method": "Method"}  # titles where space is short
TABLE = """# All results

A click on a heading sorts, a second click turns the order around. *Points lost* is the distance to the teacher. Our
accuracies are those of the last epoch, means ± standard deviations over n seeds. Their source is a table in the
[gallery's folder](../../figures/README.md) with the numbers of its rows, which `granq quantize --from-row`
[repeats](../reproduction.md#repeat-a-row-of-a-table). Results on different data sets or teachers
[cannot be compared](../results.md#three-bits).

"""


def read_notebook(text: str) -> nbformat.NotebookNode:
    """Return a notebook without its tests, and with its charts as data, which ``_static/site.js`` draws."""
    book = nbformat.reads(text, as_version=4)
    book.cells = [cell for cell in book.cells if "test" not in cell.metadata.get("tags", [])]
    for output in (output for cell in book.cells for output in cell.get("outputs", [])):
        if spec := output.get("data", {}).get(CHART):
            del spec["$schema"]  # it names another version than that of the library next to the page
            data = json.dumps(spec).replace("<", "\\u003c")
            output.data = {"text/html": f'<script class="chart" type="application/json">{data}</script>'}
    return book


def write_formula(self: Any, node: nodes.Node) -> None:
    """Write a formula as MathML, which browsers draw without a script."""
    tex = re.sub(r"\\(big+|Big+)(?![A-Za-z])", r"\\\1l", node.astext())  # docutils knows \bigl, but not \big
    self.body.append(tex2mathml(tex, as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def first_paragraph(docstring: str | None) -> str:
    return " ".join(inspect.cleandoc(docstring or "").partition("\n\n")[0].split())


def api_entry(module: str, name: str) -> tuple[str, list[str]]:
    """Return what the list of names says about one, and its entry on the page of its module."""
    value = getattr(granq, name)
    if not callable(value):
        said = " ".join(ModuleAnalyzer.for_module(module).find_attr_docs().get(("", name), []))
        keys = ", ".join(f"``{key}``" for key in value)
        return said, [f".. py:data:: {name}", "", f"   {said}", "", f"   {keys}", ""]
    entry = [f".. autofunction:: {name}", ""]
    if inspect.isclass(value):
        fields = getattr(value, "model_fields", {})  # of pydantic; some have their description inside
        entry = [f".. autoclass:: {name}{'(**fields)' if fields else ''}", "   :members:"]
        entry += ["   :exclude-members: model_config", ""]
        told = {key: field for key, field in fields.items() if field.description}
        entry += [f"   * ``{key} = {field.default!r}``: {field.description}" for key, field in told.items()]
    return first_paragraph(value.__doc__), [*entry, ""]


def write_api() -> None:
    """Write a page for each module that has public names, and a page that lists them all."""
    names: dict[str, list[str]] = {}
    for node in ast.parse((ROOT / "granq/__init__.pyi").read_text(encoding="utf-8")).body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:  # "from . import files": the module itself is public
            names.setdefault(f"granq.{node.module or alias.name}", []).extend([alias.name] if node.module else [])
    index = ["API", "===", "", inspect.cleandoc(granq.__doc__), "", ".. currentmodule:: granq", ""]
    modules = sorted(names, key=lambda name: (name.count(".") > 1, name))
    for floor, members in itertools.groupby(modules, key=lambda name: ".".join(name.split(".")[:-1][:2])):
        index += [floor, "-" * len(floor), ""]
        for module in members:
            about = first_paragraph(importlib.import_module(module).__doc__)
            page = [module, "=" * len(module), ""]
            page += [about, "", ".. currentmodule:: granq", ""] if names[module] else [f".. automodule:: {module}"]
            page += [] if names[module] else ["   :members:", ""]
            index += [f":doc:`{module}`. {about}", ""]
            for name in names[module]:
                said, entry = api_entry(module, name)
                page += entry
                index += [f"* :py:obj:`{name}`: {said}"]
            index += [""]
            (GENERATED / f"{module}.rst").write_text("\n".join(page), encoding="utf-8")
    index += [".. toctree::", "   :hidden:", "", *(f"   {module}" for module in modules), ""]
    (GENERATED / "api.rst").write_text("\n".join(index), encoding="utf-8")


def measured(files: list[Path]) -> pd.DataFrame:
    """Return a row for each kind of run in these tables: the mean of its seeds, and which rows they are.

    Runs are of one kind if all settings are the same but the seed. A column ``method`` or ``data_used`` is taken as it
    is where a table has it.
    """
    tables = [pd.read_csv(path).assign(file=path.name) for path in files]
    runs = pd.concat([table.assign(row=table.index + 1) for table in tables if "last_top1" in table], ignore_index=True)
    optional = ["method", "data_used", "true_bits_per_weight", "refined_images"]
    runs = runs.reindex(columns=runs.columns.union(optional, sort=False))
    runs["method"] = runs.method.fillna(pd.Series([method_name(row) for row in runs.to_dict("records")]))
    kind = ["file", "dataset", "network", "method", "bits", "teacher_top1", "data_used", "steps"]
    for name, field in granq.QATConfig.model_fields.items():
        if name in runs and name not in ("seed", "device"):  # a row that is older than a setting has its default
            plain = isinstance(field.default, int | float | str)
            runs[name] = runs[name].astype(object).fillna(field.default if plain else json.dumps(field.default))
            kind.append(name)
    drawn = runs.refined_images.map("{:,.0f} generated".format).where(runs.refined_images > 0, "generated")
    runs["data_used"] = runs.data_used.fillna(drawn)
    runs["steps"] = (runs.epochs - runs.warmup_epochs) * runs.iterations
    table = runs.groupby(kind, dropna=False, sort=False).agg(
        top1=("last_top1", "mean"), std=("last_top1", "std"), n=("seed", "nunique"),
        true_bits=("true_bits_per_weight", "mean"), rows=("row", lambda rows: ", ".join(map(str, rows))),
    ).reset_index()  # fmt: skip
    return table.assign(source=table.file + " " + table.rows)


def published() -> pd.DataFrame:
    """Return what papers say about methods that draw their images, with the accuracy of their teachers where given."""
    known = pd.read_csv(PUBLISHED)
    widths = [f"W{bits}A{bits}" for bits in known.bits.unique() if bits < 32]
    names = known[["dataset", "network"]].apply(lambda column: column.str.lower().str.replace("-", ""))
    tables = [published_results(widths, *pair) for pair in names.drop_duplicates().itertuples(index=False)]
    table = pd.concat(tables).rename(columns={"scheme": "method", "last_top1": "top1"})
    return table.assign(dataset=table.dataset.str.lower().str.replace("-", ""), data_used="generated")


def write_table() -> None:
    """Write the page of all results."""
    files = sorted([*ROOT.glob("figures/results_*.csv"), *ROOT.glob("figures/other_networks.csv")])
    table = pd.concat([measured(files), published()], ignore_index=True)
    table["lost"] = table.teacher_top1 - table.top1
    table = table.sort_values(["dataset", "bits", "lost"], ignore_index=True)
    digits = {"lost": 2, "top1": 2, "std": 2, "teacher_top1": 2, "n": 0, "steps": 0, "true_bits": 1}
    for name, places in digits.items():
        table[name] = [f"{value:.{places}f}" if pd.notna(value) else "" for value in table[name]]
    table["top1"] += table["std"].where(table["std"] == "", " ± " + table["std"])
    shown = {"method": "method", "bits": "bits", "dataset": "data set", "network": "network", "lost": "points lost",
             "top1": "top-1, %", "teacher_top1": "teacher, %", "n": "n", "steps": "steps",
             "true_bits": "true bits per weight", "data_used": "data used", "source": "source"}  # fmt: skip
    text = table[[*shown]].rename(columns=shown).to_html(index=False, border=0, classes="table sortable")
    (GENERATED / "table.md").write_text(f"{TABLE}{text}\n", encoding="utf-8")


def write_pages(app: Sphinx, config: Any) -> None:
    """Write the pages that are made from docstrings and from results, before Sphinx looks for pages."""
    shutil.rmtree(GENERATED, ignore_errors=True)
    GENERATED.mkdir()
    write_api()
    write_table()


def add_contents(app: Sphinx, name: str, text: list[str]) -> None:
    """Add to a page of the repository what only the site has."""
    if name == "docs/results":
        text[0] = text[0].replace("../figures/results_table.md", "generated/table.md")
    if name in CONTENTS:
        pages = [f"{SHORT[page]} </{page}>" if page in SHORT else f"/{page}" for page in CONTENTS[name]]
        text[0] += "\n".join(["", "```{toctree}", ":hidden:", "", *pages, "```", ""])


def add_scripts(app: Sphinx, name: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Add the library of the charts to pages that have one."""
    if '<script class="chart"' in context.get("body", ""):
        app.add_js_file("vega.js", loading_method="defer")
    app.add_js_file("site.js", loading_method="defer", priority=900)


def write_library(app: Sphinx) -> None:
    """Write Vega, Vega-Lite and vega-embed next to the pages, inside a function, which keeps their names apart."""
    path = Path(app.outdir) / "_static/vega.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"(() => {{{vl_convert.javascript_bundle()}}})();", encoding="utf-8")


def write_start(app: Sphinx, error: Exception | None) -> None:
    """Give the start page, which is README, the name that browsers and GitHub Pages look for."""
    if not error:
        shutil.copy(Path(app.outdir) / "README.html", Path(app.outdir) / "index.html")


# napoleon takes what stands in front of a colon in the comment of an attribute for its type
GoogleDocstring._parse_attribute_docstring = GoogleDocstring._consume_to_end


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (write_formula, None), (write_formula, None))
    app.connect("config-inited", write_pages)
    app.connect("builder-inited", write_library)
    app.connect("source-read", add_contents)
    app.connect("html-page-context", add_scripts)
    app.connect("build-finished", write_start)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
