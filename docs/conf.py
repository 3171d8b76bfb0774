"""How Sphinx builds the pages of docs/ and the reference of the modules from their docstrings: ``make docs``."""

import mrefali

project = "mrefali"
author = "The mrefali developers"
copyright = "the mrefali developers"
version = release = mrefali.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "myst_parser"]
html_theme = "alabaster"
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_google_docstring = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
