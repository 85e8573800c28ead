"""Imported once by the server that worker processes are forked from."""

import gc
import warnings

warnings.simplefilter("ignore")

import toolkit.engine.zero  # noqa: E402
import toolkit.model.build  # noqa: E402
import toolkit.train.world  # noqa: E402, F401

# 440,000 objects of libraries that a worker's collector would otherwise walk through after every cell
gc.collect()
gc.freeze()
