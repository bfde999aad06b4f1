"""What clients really send, for the mutations to begin with."""

from __future__ import annotations

import base64
import gzip
import io
import json
import struct
from typing import Any

from PIL import Image


def encoded(kind: str, size: tuple[int, int] = (9, 7), mode: str = "RGB", **options: Any) -> bytes:
    """A picture file of Pillow's."""
    data = io.BytesIO()
    Image.new(mode, size, 99).save(data, kind, **options)
    return data.getvalue()


def request(path: str, body: object, **headers: str) -> bytes:
    """A request as `Requests.run` takes it."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {"Content-Type": "application/json"}
    named |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"POST {path}", *(f"{name}: {value}" for name, value in named.items())]
    return "\n".join(lines).encode() + b"\n\n" + data


PNG = encoded("PNG")
BASE64 = base64.b64encode(PNG).decode()
URI = f"data:image/png;base64,{BASE64}"
SCHEMA = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}}
SAMPLED = {
    "max_tokens": 5,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 3,
    "seed": 7,
    "stop": ["a", "b"],
    "max_seconds": 3.5,
    "ignore_eos": False,
    "frequency_penalty": 0.1,
    "presence_penalty": -1,
    "repetition_penalty": 1.1,
    "min_p": 0.1,
    "logit_bias": {"15": -100},
    "min_tokens": 1,
    "stop_token_ids": [1],
    "logprobs": 2,
    "truncation": "auto",
}
CHAT: dict[str, Any] = {
    "model": "llava",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": URI, "detail": "low"}},
                {"type": "text", "text": "What is it?"},
            ],
        },
        {"role": "assistant", "content": "A square."},
        {"role": "user", "content": "Which colour?"},
    ],
}
OPENAI: dict[str, Any] = {
    "max_completion_tokens": 5,
    "n": 1,
    "logprobs": True,
    "top_logprobs": 2,
    "logit_bias": None,
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
    "stream": True,
    "stream_options": {"include_usage": True},
    "tools": [],
    "user": "somebody",
    "truncation": "auto",
}


def tensors(*values: tuple[str, list[str]]) -> list[dict[str, Any]]:
    """Inputs of Triton's JSON."""
    return [
        {"name": name, "shape": [len(data)], "datatype": "BYTES", "data": data}
        for name, data in values
    ]


def binary(**values: bytes) -> bytes:
    """A request in Triton's binary form."""
    inputs, data = [], b""
    for name, value in values.items():
        packed = struct.pack("<I", len(value)) + value
        size = {"binary_data_size": len(packed)}
        inputs.append({"name": name, "shape": [1], "datatype": "BYTES", "parameters": size})
        data += packed
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    kind = f"application/vnd.sagemaker-triton.binary+json;json-header-size={len(head)}"
    return request("/invocations", head + data, Content_Type=kind, **IN_SESSION)


NEW = {"X_Amzn_SageMaker_Session_Id": "NEW_SESSION"}
IN_SESSION = {"X_Amzn_SageMaker_Session_Id": "a-session"}
HISTORY = json.dumps([{"text": "What?", "answer": "A cat.", "images": 1, "image_positions": [2]}])
REQUESTS = [
    request("/v1/chat/completions", CHAT),
    request("/openai/v1/chat/completions", {**CHAT, **OPENAI}, X_Session_Id="a-name"),
    request("/invocations", {**CHAT, **SAMPLED, "logprobs": True}, X_Llava_Tenant="alice"),
    request("/invocations", {**CHAT, "n": 3, "stream": True}),
    request("/invocations", {"requestType": "NEW_SESSION", "image": BASE64, "text": "What?"}),
    request("/invocations", {"requestType": "CLOSE"}, **IN_SESSION),
    request("/invocations", {"requestType": "REWIND", "turns": 1}, **IN_SESSION),
    request("/invocations", {"requestType": "FORK"}, **IN_SESSION),
    request("/invocations", {"requestType": "REGENERATE", "seed": 3}, **IN_SESSION),
    request("/invocations", {"requestType": "STOP"}, **IN_SESSION),
    request("/invocations", {"prompt": "What is it?", "max_tokens": 3}, **IN_SESSION),
    request("/invocations", {"inputs": "What?", "parameters": {"max_new_tokens": 3}}),
    request("/invocations", {"type": "start_session", "path": URI}),
    request(
        "/invocations", {"type": "send_text_prompt", "session_id": "a-session", "prompt_text": "?"}
    ),
    request(
        "/invocations",
        {
            "inputs": tensors(
                ("text_input", ["What?"]),
                ("image", [BASE64]),
                ("sampling_parameters", [json.dumps(SAMPLED)]),
                ("history", [HISTORY]),
            ),
            "outputs": [{"name": "text_output", "parameters": {"binary_data": True}}],
            "id": "an-id",
        },
        **NEW,
    ),
    binary(text_input=b"What?", sampling_parameters=b'{"max_tokens": 3}'),
    binary(image=PNG, image_positions=b"[0]"),
    request("/invocations", PNG, Content_Type="image/png", **NEW),
    request("/invocations", b"", **NEW),
    request(
        "/v1/chat/completions", gzip.compress(json.dumps(CHAT).encode()), Content_Encoding="gzip"
    ),
    b"GET /v1/models\n\n",
    b"GET /v1/models/llava\n\n",
    b"DELETE /v1/sessions\nX-Session-Id: a-name\n\n",
    b"GET /health\n\n",
    b"GET /openapi.json\n\n",
]
SAMPLING = [
    json.dumps(SAMPLED).encode(),
    b"{}",
    json.dumps({"structured_outputs": {"json": SCHEMA}}).encode(),
    json.dumps({"structured_outputs": {"regex": "[0-9]{2}:[0-9]{2}"}}).encode(),
    json.dumps({"structured_outputs": {"choice": ["yes", "no"]}}).encode(),
    json.dumps({"structured_outputs": {"json_object": True}}).encode(),
]
TEXTS = [
    b"h" + HISTORY.encode(),
    b"p[0, 3, 9]",
    b'o{"rewind": 2, "regenerate": true}',
    b'o{"fork": "a-session"}',
    b'o{"fork": 7, "stop_answer": "b"}',
    b"tWhat is in the picture?",
    "tWas für ein Bild: 漢字?".encode(),
    b"ein ensemble 'llava', INVALID_ARG: image 1 is no picture",
    b"einference request for sequence 7 must specify the START flag",
]
HEADERS = [
    b"ia-b-7",
    b"na name",
    b"tX-Llava-Tenant: alice\nX-Amzn-SageMaker-Custom-Attributes: a=b; tenant=alice",
    b"g" + gzip.compress(b"hello " * 9),
]


def pictures() -> list[bytes]:
    """A file of each kind, small."""
    files = [
        PNG,
        encoded("PNG", mode="RGBA"),
        encoded("PNG", mode="P"),
        encoded("PNG", mode="I;16"),
        encoded("JPEG"),
        encoded("JPEG", progressive=True, size=(40, 40)),
        encoded("JPEG", mode="CMYK"),
        encoded("WEBP"),
        encoded("WEBP", lossless=True, mode="RGBA"),
        encoded("GIF"),
        encoded("BMP"),
        encoded("TIFF"),
        encoded("TIFF", compression="tiff_lzw"),
        encoded("TIFF", compression="tiff_adobe_deflate"),
        encoded("AVIF", size=(16, 16)),
    ]
    exif = Image.Exif()
    exif[0x0112] = 6
    files.append(encoded("JPEG", exif=exif))
    files += [BASE64.encode(), URI.encode(), b"https://example.org/cat.jpg"]
    return files
