"""Configure the documentation site: `scripts/docs` builds it into build/docs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

import edgeopt

project = "edgeopt"
author = "The edgeopt authors"
copyright = "The edgeopt authors. Apache-2.0"
release = edgeopt.__version__
html_title = f"edgeopt {release}"
html_theme = "furo"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "generate_reference"]
exclude_patterns = ["extensions", "notebooks/README.md"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nitpicky = False
default_role = "code"
smartquotes = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
highlight_language = "none"
