"""A corpus from any folder of repositories: filtered, ordered by dependency, cut for fill-in-the-middle."""

from dsjax.data.build.config import BuildConfig as BuildConfig
