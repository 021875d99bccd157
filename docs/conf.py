"""Settings of the documentation site; built by ``make docs``."""

from csg_seg.version import __version__

project = 'csg_seg'
author = 'the csg_seg authors'
release = __version__

extensions = [
    'myst_nb',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinx_copybutton',
]
exclude_patterns = ['_build']
html_theme = 'furo'
html_title = 'csg_seg'
html_show_copyright = False
smartquotes = False  # it turns options such as --out into dashes

nb_execution_mode = 'off'  # the notebook is stored with its outputs; make check-full executes it
myst_heading_anchors = 3
autodoc_typehints = 'description'
autodoc_member_order = 'bysource'
html_static_path = ['_static']
html_css_files = ['site.css']
