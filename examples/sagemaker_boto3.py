"""A chat about a picture through SageMaker, with boto3 alone: open, ask whole, ask streamed, close.

python examples/sagemaker_boto3.py local http://127.0.0.1:8090    # `make sagemaker-local`
python examples/sagemaker_boto3.py demo                           # an endpoint at AWS
"""

import json
import sys
from pathlib import Path

import boto3

PICTURE = Path(__file__).parent / "pictures" / "five-shapes.png"


def main(endpoint: str, endpoint_url: str | None = None) -> None:
    """Talk to an endpoint."""
    local = {} if endpoint_url is None else {
        "endpoint_url": endpoint_url,
        "region_name": "local",
        "aws_access_key_id": "none",
        "aws_secret_access_key": "none",
    }  # fmt: skip
    runtime = boto3.client("sagemaker-runtime", **local)

    # The picture travels once. The answer's header names the session, and until when it lives.
    opened = runtime.invoke_endpoint(
        EndpointName=endpoint,
        SessionId="NEW_SESSION",
        ContentType="image/png",
        Body=PICTURE.read_bytes(),
    )
    session = opened["NewSessionId"].partition(";")[0]

    # Chat completions: in a session, one message is its next turn.
    question = {"messages": [{"role": "user", "content": "How many shapes are there?"}]}
    answered = runtime.invoke_endpoint(
        EndpointName=endpoint,
        SessionId=session,
        ContentType="application/json",
        Body=json.dumps(question),
    )
    completion = json.loads(answered["Body"].read())
    print(completion["choices"][0]["message"]["content"])
    print("prompt tokens:", completion["usage"])

    streaming = {"messages": [{"role": "user", "content": "Describe the picture."}], "stream": True}
    streamed = runtime.invoke_endpoint_with_response_stream(
        EndpointName=endpoint,
        SessionId=session,
        ContentType="application/json",
        Body=json.dumps(streaming),
    )
    waiting = b""  # a part of the stream may end in the middle of a line
    for event in streamed["Body"]:
        *lines, waiting = (waiting + event["PayloadPart"]["Bytes"]).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                delta = json.loads(line[6:])["choices"][0]["delta"]
                print(delta.get("content", ""), end="", flush=True)
    print()

    closed = runtime.invoke_endpoint(
        EndpointName=endpoint,
        SessionId=session,
        ContentType="application/json",
        Body=json.dumps({"requestType": "CLOSE"}),
    )
    print("closed:", closed["ClosedSessionId"])


if __name__ == "__main__":
    main(*sys.argv[1:])
