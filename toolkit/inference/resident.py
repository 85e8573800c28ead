"""A rank that stays: it loads its part of a model once and answers one prompt after the other, as
the conversation sends them.

Every rank has a connection of its own to the conversation, so that none waits in a collective while
a person thinks. Messages are lines
of JSON: to a rank {"text": …}, {"messages": […]} or {"rebalance": true}; from rank 0 {"piece": …}
as text comes, then {"tokens": …, "finish": …} or
{"error": …}, or {"recut": what was changed, or null}; from every rank {"ready": rank} at first.
"""

from __future__ import annotations

import json
import socket
from typing import Any, TextIO

from toolkit.errors import ToolkitError
from toolkit.inference.request import Request


def serve(request: Request) -> None:
    """Load the model and answer until the conversation hangs up; a prompt that is refused leaves
    the rank as it was.
    """
    from toolkit.inference.cutting import rebalance
    from toolkit.inference.run import Session
    from toolkit.inference.text import TextStream

    assert request.socket is not None
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(request.socket)
        session = Session(request)
        lines, out = connection.makefile("r", encoding="utf-8"), connection.makefile("w", encoding="utf-8")
        tell(out, {"ready": session.world.rank, "seconds": session.load_s, "layers_per_stage": session.layers_per_stage})
        for line in lines:
            asked = json.loads(line)
            if "rebalance" in asked:
                said = rebalance(session)
                if session.world.rank == 0:
                    tell(out, {"recut": said, "layers_per_stage": session.layers_per_stage})
                continue
            try:
                ids = session.encode_one(asked)
            except ToolkitError as error:  # every rank has the same tokenizer and says the same
                if session.world.rank == 0:
                    tell(out, {"error": str(error)})
                continue
            stream = TextStream(session.text.tokenizer)
            answers = session.generate([ids], on_token=lambda _n, token, stream=stream: tell(out, {"piece": stream.push(token)}))
            if answers is not None:
                tell(out, {"piece": stream.rest()})
                tell(out, {"tokens": answers[0].tokens, "finish": answers[0].finish, "text": session.text.decode(answers[0].tokens)})
        session.close()


def tell(out: TextIO, message: dict[str, Any]) -> None:
    """Send a message."""
    out.write(json.dumps(message) + "\n")
    out.flush()
