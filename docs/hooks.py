"""mkdocs: the site has the files of the repository, at their own paths: a link serves a Git page and the site."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = (
    "*.md",
    "LICENSE",
    "CITATION.cff",
    "docs/*.md",
    "docs/*.css",
    "examples/*.ipynb",
    "examples/results/*",
    "examples/testbed/*.md",
    "examples/testbed/*.png",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The theme's files, and what is published; all of it relative to the repository's root."""
    paths = sorted(path for pattern in PUBLISHED for path in ROOT.glob(pattern))
    names = (path.relative_to(ROOT).as_posix() for path in paths)
    ours = [File(name, str(ROOT), config.site_dir, config.use_directory_urls) for name in names]
    return Files([*ours, *(file for file in files if file.src_dir != config.docs_dir)])
