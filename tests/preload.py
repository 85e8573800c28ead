"""Imported once by the server that worker processes are forked from."""

import warnings

warnings.simplefilter("ignore")

import toolkit.engine.zero  # noqa: E402
import toolkit.model.build  # noqa: E402
import toolkit.train.world  # noqa: E402, F401
