"""The documentation site: `make docs` writes it to build/site, with warnings as errors.

The source folder is the repository's root, so that links between the documents in its folders work
on the site as they do in the repository.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

import autodrop_ext

# The reference also has the papers' theory, which is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks"))

project = "autodrop_ext"
author = "the autodrop_ext authors"
copyright = f"2026, {author}"  # noqa: A001 - the name that Sphinx reads
version = release = autodrop_ext.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
root_doc = "docs/index"
include_patterns = ["*.md"]
include_patterns += [f"{folder}/*.md" for folder in ("benchmarks", "docs", "examples")]
include_patterns += ["benchmarks/results/*/*.md"]
exclude_patterns = [".venv", ".*", "build", "dist", "*.egg-info"]

html_theme = "furo"
html_title = f"autodrop_ext {release}"
html_extra_path = ["redirect"]  # the site's first address leads to docs/index.html
html_show_sourcelink = False
html_static_path = ["static"]
html_css_files = ["site.css"]

# Reports in benchmarks/results are reached by links; a test looks for the pages of docs/.
suppress_warnings = ["toc.not_included"]
nitpicky = True
# Nothing is fetched while the site is built, so that names of other packages stay unlinked.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|numpy|matplotlib|transformers|lightning)\..*"),
    (r"py:.*", r"(collections|os|pathlib|typing)\..*"),
    (r"py:.*", r"[a-z_. ]*|Any|Callable|Iterable|Mapping|Sequence|Literal.*|Path|Tensor|Optimizer"),
    (r"py:.*", r"Kernel|RateSequence"),  # names for types, written out in the text
    (r"py:.*", r"LocalShard|SavedSums"),  # internal, made by the meter
]
myst_heading_anchors = 3

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # else attributes of dataclasses stand there twice


class DarkPictures(SphinxTransform):
    """Shows ``name-dark.png`` instead of ``name.png`` on dark pages, if there is such a file."""

    default_priority = 200  # before Sphinx collects the images

    def apply(self, **kwargs: Any) -> None:
        """Put a picture for dark pages next to each image that has one."""
        folder = pathlib.Path(self.env.doc2path(self.env.docname)).parent
        for image in list(self.document.findall(nodes.image)):
            light = pathlib.PurePosixPath(image["uri"])
            dark = light.with_stem(f"{light.stem}-dark")
            if "://" in image["uri"] or not (folder / dark).is_file():
                continue
            twin = image.deepcopy()
            twin["uri"] = str(dark)
            image["classes"].append("only-light")  # classes of furo
            twin["classes"].append("only-dark")
            image.parent.insert(image.parent.index(image) + 1, twin)


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.add_transform(DarkPictures)
