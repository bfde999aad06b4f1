"""A session with this project's own client.

python examples/session_client.py [grpc://localhost:8001 or http://localhost:8000] [picture]
"""

from __future__ import annotations

import sys
from pathlib import Path

from llava_triton.client import Session, SessionError

PICTURES = sorted((Path(__file__).parent / "pictures").glob("*.*"))


def main(url: str = "grpc://localhost:8001", picture: str = str(PICTURES[0])) -> None:
    """Ask about a picture, whole and streamed."""
    with Session.open(url, image=picture) as session:
        answer = session.ask("How many shapes are there?", max_tokens=32)
        print(answer.text)
        print(
            f"  first token after {1000 * answer.first_token_seconds:.1f} ms; prompt tokens: "
            f"{answer.num_computed_tokens} computed, {answer.num_cached_tokens} reused"
        )

        try:
            session.ask("And now?", temperature=9)
        except SessionError as error:  # the session goes on as if this had not been asked
            print(f"Refused: {error}")

        if url.startswith("grpc"):  # Triton cannot stream a session's answers over HTTP
            for piece in session.stream("Describe the picture."):
                print(piece, end="", flush=True)
            print()
    # Here the session is closed, and the server has freed all that it held.


if __name__ == "__main__":
    main(*sys.argv[1:])
