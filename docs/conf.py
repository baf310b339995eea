"""Settings of the documentation site, which ``make docs`` builds.

The source folder is the repository itself, so that README, pages, lessons and gallery are taken as they are, and a link
leads where it leads on GitHub. What only the site has is made in ``_ext/granq_site.py``.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from granq_site import CONTENTS

import granq

project, copyright, release = "GranQ", "The GranQ project contributors", granq.__version__
extensions = ["granq_site", "myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

root_doc = "README"
include_patterns = ["*.md", "docs/**", "notebooks/**", "figures/README.md", "benchmarks/README.md", "granq/*/README.md"]
exclude_patterns = [".*", "docs/_*", "runs"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # as GitHub names them
nb_execution_mode = "off"  # the committed outputs are shown
nb_custom_formats = {".ipynb": "granq_site.read_notebook"}
nb_merge_streams = True

autodoc_member_order = "bysource"
toc_object_entries_show_parents = "hide"
html_math_renderer = "mathml"

html_theme = "pydata_sphinx_theme"
html_title = "GranQ"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_context = {"default_mode": "auto"}
html_sidebars = {page: [] for page in {*CONTENTS["README"]} - {*CONTENTS, "docs/generated/api"}}
html_sidebars |= {"README": [], "docs/generated/table": []}
html_theme_options = {
    "secondary_sidebar_items": {"**": ["page-toc"], "docs/generated/table": []},
    "show_prev_next": False,
    "footer_start": ["copyright"],
    "footer_end": [],
}
